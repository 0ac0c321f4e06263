"""How methods look: colours that tell apart for every common colour vision, in light and dark, and markers for paper.

A method looks the same in all figures of a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

INK = "#010203"
"""stands for the page's own text colour"""
METHODS = (
    ("#0072b2", "#4ba6e3", "o"),
    ("#d55e00", "#f58a3c", "s"),
    ("#009e73", "#2fc39a", "^"),
    ("#b3588b", "#e092bf", "D"),
    ("#b07800", "#e8b53a", "v"),
    ("#3f9fd1", "#8dcdf2", "P"),
)
"""(on white, on black, marker): Okabe and Ito's palette, its light colours darkened to be read on white"""
DASHES: tuple[Literal["solid", "dashed", "dotted", "dashdot"], ...] = ("solid", "dashed", "dotted", "dashdot")
"""lines without markers differ by these"""


def looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method, the best one (which stands last) first."""
    ends = reversed(range(len(names)))
    return {
        name: (METHODS[i % len(METHODS)][0], METHODS[i % len(METHODS)][2]) for name, i in zip(names, ends, strict=True)
    }
