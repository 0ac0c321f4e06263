"""How gains become colours: nine shades, from red (worse than static) over none to blue (better).

Blue and red stay apart for every common kind of colour blindness; worse ones are underlined on paper as well. On every
background the strongest gain stands out most, so there are two palettes.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

Rgb = tuple[int, int, int]
Four = tuple[Rgb, Rgb, Rgb, Rgb]
Codes = tuple[int, int, int, int]

THRESHOLDS = (0.1, 0.5, 1.0, 2.0)
"""nats: a gain beyond the first is shaded, beyond the last it has the strongest shade"""


BLACK, WHITE = 16, 231
"""of the colour cube"""


class Palette(NamedTuple):
    """Shades by rising |gain|, as RGB and as codes of the colour cube of 256-colour terminals."""

    better: Four
    worse: Four
    better_256: Codes
    worse_256: Codes


LIGHT = Palette(  # ColorBrewer's Blues and Reds
    ((198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107)),
    ((252, 187, 161), (251, 106, 74), (203, 24, 29), (103, 0, 13)),
    (153, 74, 25, 17),
    (217, 203, 160, 52),
)
DARK = Palette(
    ((22, 50, 74), (29, 79, 124), (44, 113, 179), (140, 195, 240)),
    ((74, 29, 24), (125, 36, 28), (189, 54, 39), (247, 167, 149)),
    (18, 24, 32, 153),
    (52, 88, 160, 217),
)


def shade(gain: float) -> int:
    """-4 … 4: the shade of a gain in nats; 0 is none."""
    level = bisect_right(THRESHOLDS, abs(gain))
    return level if gain > 0 else -level


def label(level: int) -> str:
    """Return what a shade means, in nats."""
    size = abs(level)
    if not size:
        return f"within {THRESHOLDS[0]:g}"
    low = _bound(level)
    return f"{low} to {_sign(level)}{THRESHOLDS[size]:g}" if size < len(THRESHOLDS) else f"beyond {low}"


def least(level: int) -> str:
    """Return what a shade other than none means, in a few characters: all shades fit on one line of a terminal."""
    rest = " or more" if level == len(THRESHOLDS) else " or less" if level == -len(THRESHOLDS) else ""
    return f"{_bound(level)}{rest}"


def _bound(level: int) -> str:
    return f"{_sign(level)}{THRESHOLDS[abs(level) - 1]:g}"


def _sign(level: int) -> str:
    return "+" if level > 0 else "\N{MINUS SIGN}"


def cube(code: int) -> Rgb:
    """Return the RGB of a code of the colour cube, 16 to 231, which no theme of a terminal changes."""
    steps = (0, 95, 135, 175, 215, 255)
    red, rest = divmod(code - 16, 36)
    return steps[red], steps[rest // 6], steps[rest % 6]


def luminance(color: Rgb) -> float:
    """Relative luminance, 0 to 1, as WCAG 2 defines it."""
    red, green, blue = (v / 3294.6 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: Rgb, b: Rgb) -> float:
    """Contrast ratio of WCAG 2, from 1 (none) to 21."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def style(level: int, depth: int, colors: Palette = LIGHT) -> str:
    """The control sequence of a shade; empty for none. Both its colours are fixed, whatever a terminal's theme is."""
    if not level or not depth:
        return ""
    size = abs(level) - 1
    if depth == 24:
        paper = (colors.better if level > 0 else colors.worse)[size]
        red, green, blue = paper
        return f"\x1b[38;5;{ink(paper)};48;2;{red};{green};{blue}m"
    code = (colors.better_256 if level > 0 else colors.worse_256)[size]
    return f"\x1b[38;5;{ink(cube(code))};48;5;{code}m"


def ink(paper: Rgb) -> int:
    """Black or white, as the code of the colour cube: whichever reads better."""
    return max((BLACK, WHITE), key=lambda code: contrast(cube(code), paper))
