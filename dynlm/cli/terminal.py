"""Tokens on a terminal, coloured by gain: black or white on fixed backgrounds, legible on any terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Literal, TextIO

from dynlm.report.shades import BETTER, BETTER_256, WORSE, WORSE_256, label, shade

Color = Literal["auto", "always", "never"]
RESET = "\x1b[0m"
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def color_depth(choice: Color, is_terminal: bool, environment: Mapping[str, str] = os.environ) -> int:
    """0 (plain), 8 (256 colours) or 24 bits. ``NO_COLOR`` and dumb terminals are plain unless ``always`` asks."""
    if choice == "auto":
        dumb = environment.get("TERM", "") in ("", "dumb")
        choice = "always" if is_terminal and not dumb and not environment.get("NO_COLOR") else "never"
    if choice == "never":
        return 0
    return 24 if environment.get("COLORTERM", "") in ("truecolor", "24bit") else 8


class Screen:
    """Writes tokens as they are read. What is no terminal and has no colours gets the text as it is."""

    def __init__(self, out: TextIO, color: Color) -> None:
        self.out, self.terminal = out, out.isatty()
        self.depth = color_depth(color, self.terminal)
        self.styles = {level: style(level, self.depth) for level in range(-4, 5)}

    def tokens(self, texts: Iterable[str], gains: Iterable[float]) -> None:
        """One segment; appears at once."""
        self.out.write("".join(map(self.token, texts, gains)))
        self.out.flush()

    def token(self, text: str, gain: float) -> str:
        """No control sequence of the text reaches the terminal."""
        if not self.depth:
            return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text) if self.terminal else text
        text, begin = UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text), self.styles[shade(gain)]
        if not begin or not text:
            return text
        # a background must not run on to the end of the terminal's line
        lines = [f"{begin}{line}{RESET}" if line else "" for line in text.split("\n")]
        return "\n".join(lines)

    def line(self, text: str = "") -> None:
        self.out.write(text + "\n")
        self.out.flush()

    def legend(self) -> None:
        """What the colours mean; nothing on plain output."""
        if self.depth:
            samples = " ".join(f"{self.styles[n]} {label(n)} {RESET if n else ''}" for n in range(-4, 5))
            self.line(f"gain in nats: {samples}")


def style(level: int, depth: int) -> str:
    """The control sequence of a shade; empty for none."""
    if not level or not depth:
        return ""
    size = abs(level) - 1
    ink = "30" if size < 2 else "97"
    if depth == 24:
        red, green, blue = (BETTER if level > 0 else WORSE)[size]
        return f"\x1b[{ink};48;2;{red};{green};{blue}m"
    return f"\x1b[{ink};48;5;{(BETTER_256 if level > 0 else WORSE_256)[size]}m"
