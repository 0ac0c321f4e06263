"""Progress of long work: a bar on a terminal, a line now and then in a log file, nothing with ``--quiet``.

The one door to tqdm. In a file a redrawn bar is a thousand lines that nobody reads.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

LINES = 8  # of one bar in a log file
APART = 5.0  # seconds between two of them, at least
Item = TypeVar("Item")
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Show no progress from now on, and no lines of :meth:`Bar.write`."""
    global _quiet
    _quiet = quiet


def hush_libraries() -> None:
    """Turn off the bars of transformers, datasets and the hub; to be called before they are imported."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")


class Bar:
    """Counts steps towards ``total`` (0: unknown) and shows how far they are; a context manager."""

    def __init__(
        self, total: float = 0, desc: str = "", unit: str = "step", *, initial: int = 0, unit_scale: bool = False
    ) -> None:
        self.n, self.total, self.desc, self.unit = initial, int(total), desc, unit
        self.postfix = ""
        self.started = self.told = time.perf_counter()
        self.first, self.said = initial, initial
        self.bar: Any = None
        if not _quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total or None, initial=initial, desc=desc, unit=unit, unit_scale=unit_scale)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.said != self.n and time.perf_counter() - self.started > APART:
            self._line()

    def update(self, n: float = 1) -> None:
        """Count ``n`` more steps."""
        self.n += int(n)
        if self.bar is not None:
            self.bar.update(n)
            return
        now = time.perf_counter()
        due = (
            self.n - self.said >= self.total / LINES
            if self.total
            else now - self.told >= 2 * (self.told - self.started)
        )
        if due and now - self.told >= APART and self.n != self.total:
            self.told, self.said = now, self.n
            self._line()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items and count each."""
        for item in items:
            yield item
            self.update()

    def set_postfix_str(self, text: str) -> None:
        """Set what stands behind the count: a loss, a speed."""
        self.postfix = text
        if self.bar is not None:
            self.bar.set_postfix_str(text)

    def write(self, text: str) -> None:
        """Print a line to standard output, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(text)
        elif not _quiet:
            print(text, flush=True)

    def _line(self) -> None:
        if _quiet:
            return
        seconds = time.perf_counter() - self.started
        count = f"{self.n:,} of {self.total:,}" if self.total else f"{self.n:,}"
        rate = f"{(self.n - self.first) / max(seconds, 1e-9):,.3g} {self.unit}s/s"
        rest = f", {self.postfix}" if self.postfix else ""
        print(f"{self.desc}: {count} {self.unit}s, {seconds:.0f} s, {rate}{rest}", file=sys.stderr, flush=True)
