"""Figures as SVG that stands inside an HTML page, light or dark, wide or on a phone, and as files for papers."""

from __future__ import annotations

import io
import json
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dynlm.files import replacing
from dynlm.report.looks import INK, METHODS
from dynlm.types import InputError

WIDE, NARROW = 8.0, 4.4  # inches; a phone shows the narrow one at about its size
FORMATS = ("svg", "png", "pdf")
TIP = "tip "
DOTS_PER_INCH = 200
STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's font
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a "$" in a name is a dollar
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
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


class Table(NamedTuple):
    """The numbers of a figure, as text for readers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Drawing:
    """A figure, drawn when it is needed, at either width."""

    name: str
    """prefixes every id, so it must be unique in a page; the file's name where it is exported"""
    label: str
    """for those who do not see it"""
    height: float
    """inches"""
    paint: Callable[[Figure, bool], None]
    """draws on an empty figure; the flag says that it is narrow"""
    narrow_height: float = 0.0
    """inches; 0 is as high as wide ones"""
    numbers: Table | None = None
    """what it shows, for those who want digits or do not see it"""

    def svg(self, narrow: bool = False) -> str:
        """One ``<svg>`` element without background. Equal data give equal bytes, whatever the user's settings."""
        name = f"{self.name}-narrow" if narrow else self.name
        buffer = io.StringIO()
        with self._drawn(name, narrow) as figure:
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return _inline(buffer.getvalue(), name, self.label)

    def html(self) -> str:
        """Both widths; the style sheet shows the one that fits."""
        return f'<div class="wide-figure">{self.svg()}</div><div class="narrow-figure">{self.svg(narrow=True)}</div>'

    def save(self, path: Path) -> None:
        """A file by the ending of ``path``: svg, png or pdf, black on white."""
        kind = path.suffix.removeprefix(".")
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
        with self._drawn(self.name, narrow=False) as figure, replacing(path) as temporary:
            for artist in figure.findobj(lambda artist: (artist.get_gid() or "").startswith(TIP)):
                artist.set_gid(None)  # a file has no tips
            figure.savefig(temporary, format=kind, dpi=DOTS_PER_INCH, facecolor="white", metadata=dates[kind])

    @contextmanager
    def _drawn(self, salt: str, narrow: bool) -> Iterator[Figure]:
        style = {**STYLE, "svg.hashsalt": salt}
        with matplotlib.style.context(["default", style]), warnings.catch_warnings():
            # The reader's browser has other fonts than matplotlib: a glyph missing here is not missing there.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            height = self.narrow_height or self.height if narrow else self.height
            figure = Figure(figsize=(NARROW if narrow else WIDE, height), layout="constrained")
            self.paint(figure, narrow)
            yield figure


def tell(marks: Line2D, tips: Sequence[str]) -> None:
    """Give each marker of a line, in their order, a text that a browser shows where the pointer rests on it."""
    marks.set_gid(TIP + json.dumps([drawable(tip) for tip in tips]))


def drawable(text: str) -> str:
    """Return a text in which what XML cannot hold is a dot."""
    return "".join(character if character.isprintable() else "·" for character in text)


def formats(text: str) -> tuple[str, ...]:
    """``"png,svg"`` as a tuple; :class:`InputError` for others than svg, png and pdf."""
    wanted = tuple(part.strip() for part in text.split(",") if part.strip())
    for kind in wanted:
        if kind not in FORMATS:
            raise InputError(f"format {kind!r} is unknown: choose from {', '.join(FORMATS)}, as in png,svg")
    return wanted


def _inline(svg: str, name: str, label: str) -> str:
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            # The metadata name the drawing program; the style sheet would apply to the whole page.
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    # By place: matplotlib's hash the layout's floats, whose last digits are not the same each time.
    _tips(root)
    ids = {element.get("id"): f"{name}-{number}" for number, element in enumerate(root.iter()) if element.get("id")}
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({key: _rewrite(key, value, ids) for key, value in attributes.items()})
    for key in ("width", "height", "version"):  # the page sizes it, by its viewBox
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": label})
    return ET.tostring(root, encoding="unicode")


def _tips(root: ET.Element) -> None:
    """Put the texts of :func:`tell` into the markers that they belong to."""
    for group in root.iter():
        if (told := group.get("id", "")).startswith(TIP):
            group.attrib.pop("id")  # equal texts are equal ids
            marks, texts = [e for e in group.iter() if _local(e.tag) == "use"], json.loads(told.removeprefix(TIP))
            if len(marks) == len(texts):  # a marker outside of the axes is not drawn
                for mark, text in zip(marks, texts, strict=True):
                    ET.SubElement(mark, "title").text = text


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _rewrite(key: str, value: str, ids: Mapping[str | None, str]) -> str:
    if key == "id":
        return ids[value]
    if key == "href":
        return f"#{ids[value.removeprefix('#')]}"
    value = re.sub(r"url\(#([^)]*)\)", lambda found: f"url(#{ids[found[1]]})", value)
    if key == "style":
        value = value.replace(INK, "currentColor")
        for number, (colour, _, _) in enumerate(METHODS):  # the page has others in the dark
            value = value.replace(colour, f"var(--m{number})")
    return value
