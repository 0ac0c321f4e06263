"""Signals that end ``dynlm read``: what was read so far is whole, summed up and written."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from types import FrameType

from dynlm.interrupt import Interruptible


class Stopped(Exception):  # noqa: N818 (not an error)
    """Reading was interrupted between two segments: all that was read is whole."""


class Stop(Interruptible):
    """Signals that end a process as a wish: while text is waited for it ends at once, else after the segment. A second
    one is Ctrl-C.

    Taken is SIGHUP too, which a closing terminal sends; a hang-up that ``nohup`` ignores stays ignored.
    """

    waits = False

    def signals(self) -> list[int]:
        hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
        heard = hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN
        return [*super().signals(), *([hang_up] if heard and hang_up is not None else [])]

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, number
        if self.waits or again:
            raise KeyboardInterrupt

    @property
    def exit_code(self) -> int:
        """As a shell gives it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.asked or signal.SIGINT)

    def check(self) -> None:
        if self.asked:
            raise Stopped

    def waiting(self, chunks: Iterable[str]) -> Iterator[str]:
        """Yield the chunks; what interrupts the wait for one is :class:`Stopped`."""
        source = iter(chunks)
        while True:
            try:
                self.waits = True
                self.check()
                chunk = next(source, None)
            except KeyboardInterrupt:
                raise Stopped from None
            finally:
                self.waits = False
            if chunk is None:
                return
            yield chunk
