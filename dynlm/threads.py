"""How many threads torch computes with: one where a model is small, else what a measurement of milliseconds says.

Threads that wait for each other lose more than they gain where products are small, and far more where the cores have
other work: reading with a model of 1.6M weights was 8 to 45 times slower on two busy cores with two threads than with
one (docs/LOG.md).
"""

from __future__ import annotations

import os
import time
from statistics import median
from typing import NamedTuple

import torch

from dynlm.processes import exchanged, neighbors

SMALL = 10_000_000  # weights; a segment of text through fewer is too little work to share
TURNS = 7
WORTH = 1.15  # times as fast as one thread that all of them must be


class Threads(NamedTuple):
    """A number of threads, and why."""

    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.number} ({self.reason})"


def choose_threads(requested: int = 0, weights: int = 0, product: tuple[int, int, int] | None = None) -> Threads:
    """Set and return torch's number of threads.

    ``requested`` or ``OMP_NUM_THREADS`` decide where they are given. A model of at most 10 million ``weights`` reads
    with one. Otherwise a product of (rows, inner, columns) is timed with one thread and with all, in turns for some
    50 ms; a training gives the ``product`` it spends its time on. Processes that share a machine share its cores, and
    all take the number of the first.
    """
    chosen = exchanged(_choose(requested, weights, product))[0]
    torch.set_num_threads(chosen.number)
    return chosen


def _choose(requested: int, weights: int, product: tuple[int, int, int] | None) -> Threads:
    most = torch.get_num_threads()
    if requested:
        return Threads(requested, "--threads")
    if os.environ.get("OMP_NUM_THREADS"):
        return Threads(most, "OMP_NUM_THREADS")
    if product is None and weights <= SMALL:
        return Threads(1, "the model is small")
    most = max(most, os.cpu_count() or 1) // neighbors()
    if most <= 1:
        return Threads(1, "one core" if neighbors() == 1 else "a core for each process")
    times = _measure(product or (32, 1024, 4096), (1, most))
    faster = times[1] / times[most]
    said = f"{most} measured {faster:.2f} × as fast as one"
    return Threads(most if faster >= WORTH else 1, said)


def _measure(product: tuple[int, int, int], numbers: tuple[int, ...]) -> dict[int, float]:
    """Return the median seconds of a product for each number of threads, measured in turns."""
    rows, inner, columns = product
    a, b = torch.ones(rows, inner), torch.ones(inner, columns)
    times: dict[int, list[float]] = {number: [] for number in numbers}
    before = torch.get_num_threads()
    for _ in range(TURNS + 1):
        for number in numbers:
            torch.set_num_threads(number)
            started = time.perf_counter()
            torch.mm(a, b)
            times[number].append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return {number: median(seconds[1:]) for number, seconds in times.items()}  # the first one starts the threads
