"""What the pages share: templates, the style sheet, and numbers as readers want them."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dynlm.report.looks import METHODS
from dynlm.report.numbers import likelier, plus, three, times
from dynlm.report.shades import DARK, LIGHT, THRESHOLDS, Palette

MINUS = "\N{MINUS SIGN}"
NONE = "–"


def render(template: str, **values: Any) -> str:
    """Return a page as text; ``script`` is the one script that its policy lets run."""
    script = resource("tokens.js").replace("/* thresholds */", json.dumps(THRESHOLDS))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(**values, style=_style(), script=script, script_hash=f"sha256-{digest}")
    )


@functools.cache
def resource(name: str) -> str:
    """Return a text file beside this module."""
    return resources.files("dynlm.report").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dynlm.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        ppl=ppl,
        signed=signed,
        span=span,
        percent=percent,
        plain=plain,
        likelier=likelier,
        three=three,
        plus=plus,
        bits=bits,
        course=course,
    )
    return environment


def _style() -> str:
    """Return the style sheet with the colours of methods and shades in it."""
    light = " ".join(f"--m{number}: {colour};" for number, (colour, _, _) in enumerate(METHODS))
    dark = " ".join(f"--m{number}: {colour};" for number, (_, colour, _) in enumerate(METHODS))
    sheet = resource("style.css")
    for kind, values in (
        ("shades, light", _shades(LIGHT)),
        ("shades, dark", _shades(DARK)),
        ("methods, light", light),
        ("methods, dark", dark),
    ):
        sheet = sheet.replace(f"/* {kind} */", values)
    return sheet


def _shades(palette: Palette) -> str:
    """Return the shades as custom properties of the style sheet."""
    return " ".join(
        f"--{side}{number}: #{red:02x}{green:02x}{blue:02x};"
        for side, colors in (("b", palette.better), ("w", palette.worse))
        for number, (red, green, blue) in enumerate(colors, 1)
    )


def interval(ci95: Sequence[float | None] | None) -> tuple[float, float] | None:
    """Return the two ends, or None where there is no spread: a bootstrap over one article knows nothing."""
    if not ci95 or ci95[0] is None or ci95[1] is None or ci95[0] == ci95[1]:
        return None
    return float(ci95[0]), float(ci95[1])


def ppl(value: float | None) -> str:
    """Format a perplexity to about four digits; None is one that overflowed."""
    if value is None or not value < 1e6:
        return "beyond a million"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def bits(value: float | None) -> str:
    """Bits per byte to a thousandth; a dash where the tokens do not spell the text."""
    return NONE if value is None else f"{value:.3f}"


def signed(value: float | None, digits: int = 3) -> str:
    """Return a difference with its sign; zero has none."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{abs(value):.{digits}f}"
    sign = "" if float(text) == 0 else MINUS if value < 0 else "+"
    return sign + text


def span(ci95: Sequence[float | None] | None, digits: int = 3) -> str:
    """Return an interval in words."""
    ends = interval(ci95)
    return NONE if ends is None else f"{signed(ends[0], digits)} to {signed(ends[1], digits)}"


def percent(fraction: float) -> str:
    """``0.345`` as "34.5 % lower"; below zero it is higher, and from ten times on so many times as high."""
    if fraction < -9:
        return f"{times(1 - fraction)} times as high"
    return f"{abs(fraction):.1%} ".replace("%", "\N{NO-BREAK SPACE}%") + ("lower" if fraction >= 0 else "higher")


def course(losses: Sequence[float]) -> str:
    """Say how a loss goes from the first occurrence to the last."""
    change = losses[-1] - losses[0]
    if signed(change, 1) == "0.0":
        return "stays about the same"
    return f"{'falls' if change < 0 else 'rises'} by {abs(change):.1f}"


def plain(value: Any) -> str:
    """Return a setting for a reader: text as it is, numbers to four digits unless whole, all else as JSON."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
