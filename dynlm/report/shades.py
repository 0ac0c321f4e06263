"""How gains become colours: nine shades, from red (worse than static) over none to blue (better).

Blue and red stay apart for every common kind of colour blindness; worse ones are underlined on paper as well.
"""

from __future__ import annotations

from bisect import bisect_right

THRESHOLDS = (0.1, 0.5, 1.0, 2.0)
"""nats: a gain beyond the first is shaded, beyond the last it has the strongest shade"""
BETTER = ((198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
WORSE = ((252, 187, 161), (251, 106, 74), (203, 24, 29), (103, 0, 13))
"""RGB by rising |gain|; ColorBrewer's Blues and Reds"""
BETTER_256, WORSE_256 = (153, 74, 25, 17), (217, 203, 160, 52)
"""the nearest of the 256 terminal colours"""


def shade(gain: float) -> int:
    """-4 … 4: the shade of a gain in nats; 0 is none."""
    level = bisect_right(THRESHOLDS, abs(gain))
    return level if gain > 0 else -level


def label(level: int) -> str:
    """What a shade means, in nats."""
    size = abs(level)
    if not size:
        return f"within {THRESHOLDS[0]:g}"
    sign = "+" if level > 0 else "\N{MINUS SIGN}"
    low = f"{sign}{THRESHOLDS[size - 1]:g}"
    return f"{low} to {sign}{THRESHOLDS[size]:g}" if size < len(THRESHOLDS) else f"beyond {low}"
