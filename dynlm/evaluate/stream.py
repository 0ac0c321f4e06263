"""Reading a set of articles with one method, score before update, and keeping every loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlm.adapt import Reader
from dynlm.types import InputError, TokenizedArticle


class Scores(NamedTuple):
    """Losses of one method: one float32 tensor (T,) of nats an article, and the wall-clock seconds of reading."""

    losses: list[Tensor]
    seconds: float

    @property
    def nats_per_article(self) -> Tensor:
        """(articles,) float64 sums."""
        return torch.stack([losses_T.double().sum() for losses_T in self.losses])

    @property
    def nats(self) -> float:
        return float(self.nats_per_article.sum())


def read_articles(
    reader: Reader, articles: Sequence[TokenizedArticle], start_id: int, progress: Callable[[int], Any] | None = None
) -> Scores:
    """Read ``articles`` in order inside ``reader``'s context, which puts θ0 back afterwards."""
    if not articles:
        raise InputError("no article to read: the chosen split is empty")
    with reader:
        reader.begin()
        started = time.perf_counter()
        losses = [reader.read(article, start_id, progress).float().cpu() for article in articles]
        return Scores(losses, time.perf_counter() - started)
