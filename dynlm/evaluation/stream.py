"""Reading a set of articles with one method, score before update, and keeping every loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlm import results
from dynlm.data.segments import article_segments
from dynlm.evaluation.calibration import Calibration
from dynlm.evaluation.gates import GateRecorder, Gates
from dynlm.inner import InnerLoop
from dynlm.processes import exchanged, spread
from dynlm.types import DivergedError, InputError, TokenizedArticle


class Scores(NamedTuple):
    """Losses of one method: one float32 tensor (T,) of nats an article, and the wall-clock seconds of reading."""

    losses: list[Tensor]
    seconds: float
    calibration: results.Calibration | None = None
    """where it was observed"""
    again: Tensor | None = None
    """(T,) nats of the first article with the weights that the stream has left, without learning (reset never); of
    rules that learn"""
    gates: Gates | None = None
    """of the first articles' updates, where they were watched"""

    @property
    def nats_per_article(self) -> Tensor:
        """(articles,) float64 sums."""
        return torch.stack([losses_T.double().sum() for losses_T in self.losses])

    @property
    def nats(self) -> float:
        return float(self.nats_per_article.sum())


def read_articles(
    reader: InnerLoop, articles: Sequence[TokenizedArticle], start_id: int, progress: Callable[[int], Any] | None = None
) -> Scores:
    """Read ``articles`` inside ``reader``'s context, which puts θ0 back afterwards; several processes share them."""

    def read(number: int) -> Tensor:
        return reader.read(articles[number], start_id, progress).float().cpu()

    if not articles:
        raise InputError("no article to read: the chosen split is empty")
    with reader:
        started = time.perf_counter()
        losses = spread(read, list(map(len, articles)), divided=reader.config.reset == "article")
        return Scores(losses, time.perf_counter() - started)


def read_and_watch(
    reader: InnerLoop,
    articles: Sequence[TokenizedArticle],
    start_id: int,
    progress: Callable[[int], Any] | None = None,
    gate_articles: int = 0,
) -> Scores:
    """As :func:`read_articles`, with calibration and, where nothing is reset, the first article read again.

    The seconds are those of the process that reads longest. Rules that leave θ0 as it is do not read again. The gates
    of all others are recorded while the first ``gate_articles`` articles are read.

    Raises:
        DivergedError: a loss that is not finite, with its article and segment.
    """
    if not articles:
        raise InputError("no article to read: the chosen split is empty")
    calibration, seconds, again = Calibration(), 0.0, None
    divided = reader.config.reset == "article"
    recorder = GateRecorder(reader) if gate_articles and reader.rule.reads_gradient else None

    def read(number: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return losses, calibration and gates of one article."""
        nonlocal seconds
        article, first = articles[number], len(recorder.values) if recorder else 0
        started, observing = time.perf_counter(), reader.observing
        calibration.begin_article()
        try:
            with recorder.article() if recorder and number < gate_articles else nullcontext():
                losses_T = reader.read(article, start_id, progress).float().cpu()
        except DivergedError as error:
            raise DivergedError(f"article {number} ({article.title!r}): {error}") from None
        seconds += time.perf_counter() - started - (reader.observing - observing)
        return losses_T, calibration.articles[-1], recorder.values[first:] if recorder else []

    with reader, reader.observed_by(calibration):
        found = spread(read, list(map(len, articles)), divided=divided)
        if not divided and reader.rule.reads_gradient:
            (again,) = spread(lambda _: score_only(reader, articles[0], start_id).float().cpu(), [1.0], divided=False)
    losses, sums, gates = zip(*found, strict=True)
    if recorder:
        recorder.values = [values for of_article in gates for values in of_article]
        recorder.segments = [len(of_article) for of_article in gates[:gate_articles]]
    recorded = recorder.gates() if recorder else None
    return Scores(list(losses), max(exchanged(seconds)), Calibration(sums).summary(), again, recorded)


def score_only(reader: InnerLoop, article: TokenizedArticle, start_id: int) -> Tensor:
    """(T,) nats of the model alone under the present weights, from an empty hidden state; nothing learns or moves."""
    hidden: Any = None
    losses = []
    ids_T = article.ids_T.to(reader.parameters[0].device)
    with torch.no_grad():
        for inputs_S, targets_S in article_segments(ids_T, start_id, reader.config.segment):
            losses_S, hidden = reader.score(inputs_S, targets_S, hidden)
            losses.append(losses_S)
    return torch.cat(losses)
