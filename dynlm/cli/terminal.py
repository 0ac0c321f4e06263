"""What a person sees on a terminal: tokens coloured by gain, and lines that no text can turn into control sequences.

Lines are broken by the terminal, not here: it does so again when its width changes, and what is copied is the text.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Literal, TextIO

from dynlm.printable import printable
from dynlm.report.shades import DARK, LIGHT, Palette, least, shade, style
from dynlm.types import InputError

Color = Literal["auto", "always", "never"]
Theme = Literal["auto", "light", "dark"]
RESET = "\x1b[0m"
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
RULE = "\u2500\u256d\u2570\u256f-"
FIELD = re.compile(
    r"(Error parsing (?:[A-Z]\w*|(?P<section>[a-z][\w.-]*)): |(?=[A-Z]))([A-Z]\w*\.)?(?P<field>\w+)(?= (is|has|names) )"
)
"""the name of a setting behind what tyro and a class of settings put before it"""
LIGHT_BACKGROUNDS = {7, 9, 10, 11, 12, 13, 14, 15}


def tell(message: str) -> None:
    """One line for the person, on standard error."""
    print(f"dynlm: {printable(message)}", file=sys.stderr, flush=True)


class _Notes(logging.Handler):
    """Says what the library logs."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(f"note: {record.getMessage()}")


@contextmanager
def noted(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, say what the library logs, as notes: a stage in its log, ``dynlm read`` beside the text.

    Warnings and information; a program of one's own sees warnings alone, unless it lowers the level of ``dynlm``.
    """
    library, handler = logging.getLogger("dynlm"), _Notes(say)
    propagated, library.propagate = library.propagate, False
    level = library.level
    library.setLevel(logging.INFO)
    library.addHandler(handler)
    try:
        yield
    finally:
        library.removeHandler(handler)
        library.setLevel(level)
        library.propagate = propagated


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the box that tyro prints of a wrong flag into one line: the flag, what is wrong, what comes nearest.

    Raises:
        InputError: instead of tyro's exit with code 2.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except SystemExit as end:
        if end.code in (0, None):
            raise
        title, *lines = (line.strip("\u2502 ") for line in said.getvalue().strip().splitlines())
        if not lines[0].strip(RULE):  # a box of plain characters has one below its title
            del lines[0]
        rule = next((i for i, line in enumerate(lines) if not line.strip(RULE)), len(lines))
        after = lines[lines.index("Perhaps you meant:") :] if "Perhaps you meant:" in lines else []
        near = next((f": did you mean {line.split()[0]}?" for line in after if line.startswith("--")), "")
        raise InputError(f"{_named(' '.join(lines[:rule]).rstrip('.') or title)}{near}") from None
    except InputError as error:  # of the outermost settings
        raise InputError(_named(str(error))) from None
    sys.stderr.write(said.getvalue())


def _named(message: str) -> str:
    """Put the name of a setting as a recipe has it, ``train.epochs``, for a section of tyro and a field of a class."""
    match = FIELD.match(message)
    if not match:
        return message
    section, field = match["section"], match["field"]
    return f"{f'{section}.{field}' if section else '--' + field.replace('_', '-')}{message[match.end() :]}"


def color_depth(choice: Color, is_terminal: bool, environment: Mapping[str, str] = os.environ) -> int:
    """0 (plain), 8 (256 colours) or 24 bits. ``NO_COLOR`` and dumb terminals are plain unless ``always`` asks."""
    if choice == "auto":
        dumb = environment.get("TERM", "") in ("", "dumb")
        choice = "always" if is_terminal and not dumb and not environment.get("NO_COLOR") else "never"
    if choice == "never":
        return 0
    return 24 if environment.get("COLORTERM", "") in ("truecolor", "24bit") else 8


def palette(theme: Theme, environment: Mapping[str, str] = os.environ) -> Palette:
    """Return the palette for a background. ``auto`` asks ``COLORFGBG``, which some terminals set; without it, dark."""
    if theme == "auto":
        background = environment.get("COLORFGBG", "").rpartition(";")[2]
        theme = "light" if background.isdecimal() and int(background) in LIGHT_BACKGROUNDS else "dark"
    return LIGHT if theme == "light" else DARK


class Screen:
    """Writes tokens as they are read. What is no terminal and has no colours gets the text as it is."""

    def __init__(self, out: TextIO, color: Color, theme: Theme = "auto") -> None:
        self.out, self.terminal = out, out.isatty()
        self.depth, colors = color_depth(color, self.terminal), palette(theme)
        self.styles = {level: style(level, self.depth, colors) for level in range(-4, 5)}

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
        """One line of our own, with nothing of a text in it that moves the cursor."""
        self._write_line(printable(text))

    def legend(self) -> None:
        """What the colours mean; nothing on plain output."""
        if self.depth:
            samples = (f"{self.styles[n]} {least(n)} {RESET}" for n in range(-4, 5) if n)
            self._write_line(f"gain in nats: {' '.join(samples)}")

    def _write_line(self, text: str) -> None:
        self.out.write(text + "\n")
        self.out.flush()
