"""Ctrl-C and SIGTERM in long work: the present step is finished and a checkpoint written, or none is promised."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType, TracebackType
from typing import Self


class Interrupted(KeyboardInterrupt):
    """Work was ended by a signal; the message says what was saved and how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signal_number


class Interruptible:
    """Inside, the first signal that ends a process only sets ``asked``, for the work to look at between steps."""

    asked: int = 0
    """the signal's number, 0 without one"""

    def __enter__(self) -> Self:
        self._before = {}
        with contextlib.suppress(ValueError):  # not in the main thread, which alone gets signals
            for number in self.signals():
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def signals(self) -> list[int]:
        """Return the signals to take: Ctrl-C, and SIGTERM, which schedulers and containers send."""
        return [signal.SIGINT, signal.SIGTERM]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
