"""Few-shot tests: adapt to each task's support, score its query; means with 95 % bootstrap intervals over tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from dynlm.inner import InnerLoop
from dynlm.labs.fewshot.tasks import FewShotTask
from dynlm.paired import bootstrap_ratio
from dynlm.processes import spread
from dynlm.types import DivergedError, InputError, Piece

Measure = Callable[[InnerLoop, Piece], float]
"""What the adapted model is worth on a query; smaller is better."""


class Mean(NamedTuple):
    """A mean over tasks and its 95 % interval."""

    value: float
    ci95: tuple[float, float]


def mean_loss(reader: InnerLoop, query: Piece) -> float:
    """Mean loss of the query: squared error, or nats."""
    return reader.score(*query, None)[0].mean().item()


def error_rate(reader: InnerLoop, query: Piece) -> float:
    """Share of the query whose highest score is not its label's."""
    inputs, labels_B = query
    wrong_B = reader.model(inputs).argmax(1) != labels_B
    return float(wrong_B.float().mean())


def adapted(reader: InnerLoop, tasks: Sequence[FewShotTask], steps: int, measure: Measure) -> list[float]:
    """``measure`` on each task's query after ``steps`` updates on its support, each task from θ0; processes share them.

    Raises:
        InputError: a loss that is not finite.
    """

    def value(number: int) -> float:
        reader.begin()
        for _ in range(steps):
            reader.segment(*tasks[number].support)
        with torch.no_grad():
            return measure(reader, tasks[number].query)

    with reader:
        return spread(value, [1.0] * len(tasks))


def mean_over_tasks(values: Sequence[float]) -> Mean:
    """Return the mean with its percentile bootstrap interval."""
    sums = torch.tensor(values, dtype=torch.float64)
    return Mean(float(sums.mean()), bootstrap_ratio(sums, torch.ones_like(sums)))


class TunedRate(NamedTuple):
    """The best learning rate of a grid, its mean, and whether it is the first or last of those that were tried."""

    lr: float
    value: float
    at_bound: bool


def tune_rate(rates: Sequence[float], mean_at: Callable[[float], float]) -> TunedRate:
    """Return the rate where ``mean_at`` is smallest; a rate at which reading diverges does not count.

    Raises:
        InputError: no rate is left.
    """
    found: dict[float, float] = {}
    for rate in sorted(rates):
        try:
            found[rate] = mean_at(rate)
        except DivergedError:
            break  # larger rates diverge too
    if not found:
        raise InputError(f"the loss is not finite at any of the rates {tuple(rates)}: add smaller ones")
    best = min(found, key=lambda rate: found[rate])
    return TunedRate(best, found[best], best in (min(rates), max(rates)))
