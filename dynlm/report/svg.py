"""Turn a matplotlib figure into an SVG that can stand inside an HTML page, light or dark, beside other SVGs."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's own text colour: becomes ``currentColor``
WIDTH_INCHES = 8.0
STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's font
    "text.parse_math": False,  # a "$" in a name is a dollar
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "font.size": 9.0,
}


def draw_svg(name: str, label: str, height_inches: float, paint: Callable[[Axes], None]) -> str:
    """What ``paint`` draws, as one ``<svg>`` element.

    ``name`` prefixes every id, so it must be unique in the page; ``label`` is the text for those who do not see it.
    The user's own matplotlib settings have no influence: equal data give equal bytes.
    """
    buffer = io.StringIO()
    with matplotlib.style.context(["default", {**STYLE, "svg.hashsalt": name}]), warnings.catch_warnings():
        # The reader's browser has other fonts than matplotlib: a glyph missing here is not missing there.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        paint(figure.add_subplot())
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name, label)


def _inline(svg: str, name: str, label: str) -> str:
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            # The metadata name the drawing program; the style sheet would apply to the whole page.
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({key: _rewrite(key, value, name) for key, value in attributes.items()})
    for key in ("width", "height", "version"):  # the page sizes it, by its viewBox
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": label})
    return ET.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _rewrite(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key == "href":
        return value.replace("#", f"#{prefix}-", 1)
    value = re.sub(r"url\(#", f"url(#{prefix}-", value)
    return value.replace(INK, "currentColor") if key == "style" else value
