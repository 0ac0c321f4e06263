"""README and documentation as tests see them: their blocks of Python, which are run, and their commands."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
DIARY = "docs/LOG.md"
"""says what was done, with the flags of its day"""
LIVING = {page: text for page, text in PAGES.items() if page != DIARY}
RUN: dict[str, set[int]] = {}
"""by page, the numbers of the blocks that some test runs"""


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def runs(page: str, *numbers: int) -> Callable[[Any], Any]:
    """Say which blocks of a page the decorated test runs; without numbers, all."""
    RUN.setdefault(page, set()).update(numbers or range(len(blocks(page))))
    return lambda test: test


def run(page: str, names: dict[str, Any], *numbers: int, **shorter: str) -> dict[str, Any]:
    """Execute blocks of a page in order with ``names`` defined; returns the names afterwards.

    ``shorter``: settings (``trials="2"``) that replace those of the page, so that a test takes seconds.
    """
    codes = blocks(page)
    for number in numbers or range(len(codes)):
        code = codes[number]
        for setting, value in shorter.items():
            code = re.sub(rf"\b{setting}=\d+", f"{setting}={value}", code)
        exec(compile(code, f"{page}, block {number}", "exec"), names)
    return names


def commands(page: str) -> Iterator[list[str]]:
    """Yield the arguments of every ``dynlm`` command of a page, in its blocks of shell and within its lines."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for line in [*lines, *re.findall(r"`(dynlm [^`]+)`", prose)]:
        for part in line.split("|"):
            words = shlex.split(part, comments=True)
            if words[:1] == ["dynlm"] and not words[1].isupper():
                ends = [i for i, word in enumerate(words) if word.startswith((">", "2>"))]
                yield words[1 : min(ends, default=len(words))]
