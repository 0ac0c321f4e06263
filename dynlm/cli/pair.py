"""The two readers of ``dynlm read`` over one stream of tokens, and the signals that end it.

Both score the same tokens, each strictly before the update that sees it. Tokens are cut into segments as
:class:`dynlm.adapt.Reader` cuts an article, whatever the chunks a text comes in.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dynlm.adapt import Snapshot
from dynlm.cli.kit import Kit
from dynlm.cli.memory import copied
from dynlm.cli.terminal import tell
from dynlm.cli.totals import Totals
from dynlm.data.spacing import Spacer
from dynlm.data.texts import Text, encode_chunk, surfaces
from dynlm.types import DivergedError, Piece

LOWER = 0.25
"""of the learning rate after a divergence"""
RESTARTS_TOLD = 5


class Scored(NamedTuple):
    """Tokens of one segment: their stretches of the text and their losses in nats under both readers."""

    texts: list[str]
    static: list[float]
    adapted: list[float]


class Stopped(Exception):  # noqa: N818 (not an error)
    """Reading was interrupted between two segments: all that was read is whole."""


class Stop:
    """Signals that end a process as a wish: while text is waited for it ends at once, else after the segment. A second
    one is Ctrl-C.

    Taken are Ctrl-C, SIGTERM, which schedulers and containers send, and SIGHUP, which a closing terminal sends.
    """

    def __init__(self) -> None:
        self.waits, self.asked = False, 0
        """``asked``: the number of the signal, 0 without one"""

    def __enter__(self) -> Stop:
        self.before: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # not in the main thread, which alone is interrupted
            for number in _signals():
                self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
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
        """The chunks; what interrupts the wait for one is :class:`Stopped`."""
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


def _signals() -> list[int]:
    """Those to take; a hang-up that ``nohup`` ignores stays ignored."""
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    heard = hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([hang_up] if heard and hang_up is not None else [])]


class Pair:
    """The static and the adapted reader. ``start`` is a saved position that each beginning goes on from."""

    def __init__(self, kit: Kit, resets: Literal["article", "never"], spacing: Literal["auto", "none", "wikitext"]):
        self.kit, self.resets, self.spacing = kit, resets, spacing
        self.static, self.adapted = kit.readers()
        self.size, self.start_id = kit.config.segment, kit.tokenizer.eos_id
        self.start: Snapshot | None = None
        self.static_hidden = None
        self.stop, self.in_word = Stop(), False
        self.begin()

    def begin(self) -> None:
        self.static.begin()
        self.static.hidden = self.static_hidden
        if self.start is None:
            self.adapted.begin()
        else:
            self.adapted.resume(copied(self.start))

    def read(self, text: Text, totals: Totals) -> Iterator[Scored]:
        """One text, segment by segment; ``totals`` grows with it.

        Raises:
            Stopped: a signal, between two segments.
        """
        if self.resets == "article" and totals.articles:
            self.begin()
        totals.articles += 1
        ids: list[int] = []
        texts: list[str] = []
        tokens, self.in_word = self._tokens(), False
        previous = self.start_id
        for chunk in self.stop.waiting(text.chunks):
            new_ids, new_texts = tokens(chunk)
            ids += new_ids
            texts += new_texts
            whole = len(ids) - len(ids) % self.size
            for at in range(0, whole, self.size):
                yield self._segment(previous, ids[at : at + self.size], texts[at : at + self.size], totals)
                self.stop.check()
                previous = ids[at + self.size - 1]
            del ids[:whole], texts[:whole]
        if ids:
            yield self._segment(previous, ids, texts, totals)

    def _tokens(self) -> Callable[[str], tuple[list[int], list[str]]]:
        """For the chunks of one text: (ids, the stretch of the text that each stands for)."""
        tokenizer = self.kit.tokenizer
        wished = self.kit.spacing if self.spacing == "auto" else self.spacing
        spacer = Spacer(auto=self.spacing == "auto") if wished == "wikitext" else None

        def tokens(chunk: str) -> tuple[list[int], list[str]]:
            spaced = spacer(chunk) if spacer else None
            source = spaced.text if spaced else chunk
            ids = encode_chunk(tokenizer, source)
            texts = surfaces(tokenizer.pieces(ids), source)
            return ids, spaced.originals(texts) if spaced else texts

        return tokens

    def _segment(self, previous: int, ids: list[int], texts: list[str], totals: Totals) -> Scored:
        started = time.perf_counter()
        targets_S = torch.tensor(ids)
        inputs_S = torch.tensor([previous, *ids[:-1]])
        device = self.adapted.parameters[0].device
        pieces = inputs_S.to(device), targets_S.to(device)
        static_S, adapted_S = self._scored(pieces, totals)
        totals.tokens += len(ids)
        totals.updates, totals.clipped = totals.updates + self.adapted.rule.reads_gradient, self.adapted.clipped
        unknown = (text for token, text in zip(ids, texts, strict=True) if token == self.kit.tokenizer.unk_id)
        totals.unknown_bytes += len("".join(unknown).encode())
        totals.static += float(static_S.sum())
        totals.adapted += float(adapted_S.sum())
        self._count("".join(texts), totals)
        totals.seconds += time.perf_counter() - started
        return Scored(texts, static_S.tolist(), adapted_S.tolist())

    def _scored(self, piece: Piece, totals: Totals) -> tuple[Tensor, Tensor]:
        """Losses of both. An error leaves both where they were before this segment, unless it was in the update."""
        readers = self.static, self.adapted
        hidden = [reader.hidden for reader in readers]
        try:
            static_S = self.static.segment(*piece).losses_S
            try:
                adapted_S = self.adapted.segment(*piece).losses_S
            except DivergedError:
                self._start_anew(hidden[0], totals)
                adapted_S = self.adapted.segment(*piece).losses_S
        except BaseException:
            for reader, before in zip(readers, hidden, strict=True):
                reader.hidden = before
            raise
        return static_S.double().cpu(), adapted_S.double().cpu()

    def _start_anew(self, static_hidden: Any, totals: Totals) -> None:
        """Go on after a divergence from θ0, as if nothing had been learned, with a lower rate of a hand-made rule."""
        rule = self.adapted.rule
        told, rate = "", getattr(rule, "lr", None)
        if rule.kind == "hand-made" and isinstance(rate, Tensor):
            rate.data.mul_(LOWER)
            told = f" with lr {float(rate):.3g}"
        self.adapted.hidden = static_hidden
        totals.restarts += 1
        if totals.restarts <= RESTARTS_TOLD:
            tell(
                f"note: reading with {rule.name} diverged after {totals.tokens:,} tokens; "
                f"it goes on from the trained weights{told}"
            )

    def _count(self, text: str, totals: Totals) -> None:
        """Words, lines and bytes of a stretch, which may begin within a word."""
        if text:
            totals.bytes += len(text.encode())
            totals.lines += text.count("\n")
            totals.words += len(text.split()) - (self.in_word and not text[0].isspace())
            self.in_word = not text[-1].isspace()
