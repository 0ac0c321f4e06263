"""The two readers of ``dynlm read`` over one stream of tokens, and what they sum up.

Both score the same tokens, each strictly before the update that sees it. Tokens are cut into segments as
:class:`dynlm.adapt.Reader` cuts an article, whatever the chunks a text comes in.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Literal, NamedTuple

import torch

from dynlm.adapt import Snapshot
from dynlm.cli.kit import Kit
from dynlm.cli.memory import copied
from dynlm.data.spacing import Spacer
from dynlm.data.texts import Text, encode_chunk, surfaces


class Scored(NamedTuple):
    """Tokens of one segment: their stretches of the text and their losses in nats under both readers."""

    texts: list[str]
    static: list[float]
    adapted: list[float]


@dataclass
class Totals:
    """Sums over all that was read. ``words`` counts an end-of-line a line, as everywhere in dynlm."""

    articles: int = 0
    tokens: int = 0
    words: int = 0
    bytes: int = 0
    static: float = 0.0
    """nats"""
    adapted: float = 0.0
    """nats"""
    seconds: float = 0.0

    @property
    def gain(self) -> float:
        """Nats a token."""
        return (self.static - self.adapted) / max(1, self.tokens)

    def perplexity(self, nats: float) -> float:
        """By word."""
        return perplexity(nats, self.words)


def perplexity(nats: float, n: int) -> float:
    """Infinite where it would be beyond all numbers, as by the word of a text with next to no words."""
    mean = nats / max(1, n)
    return math.exp(mean) if mean < 700 else math.inf


class Stopped(Exception):  # noqa: N818 (not an error)
    """Reading was interrupted between two segments: all that was read is whole."""


class Stop:
    """Ctrl-C as a wish: while text is waited for it ends at once, else after the segment. A second one is Ctrl-C."""

    def __init__(self) -> None:
        self.waits = self.asked = False

    def __enter__(self) -> Stop:
        self.before = None
        with contextlib.suppress(ValueError):  # not in the main thread, which alone is interrupted
            self.before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.waits or self.asked:
            raise KeyboardInterrupt
        self.asked = True

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
            Stopped: Ctrl-C, between two segments.
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
        static_S, adapted_S = (r.segment(*pieces).losses_S.double().cpu() for r in (self.static, self.adapted))
        totals.tokens += len(ids)
        totals.static += float(static_S.sum())
        totals.adapted += float(adapted_S.sum())
        self._count("".join(texts), totals)
        totals.seconds += time.perf_counter() - started
        return Scored(texts, static_S.tolist(), adapted_S.tolist())

    def _count(self, text: str, totals: Totals) -> None:
        """Words and bytes of a stretch, which may begin within a word."""
        if text:
            totals.bytes += len(text.encode())
            totals.words += len(text.split()) + text.count("\n") - (self.in_word and not text[0].isspace())
            self.in_word = not text[-1].isspace()
