"""How an unroll is cut into checkpointed slices: what a choice holds at its peak, and the choice that fits a budget.

With slices of k₁ > k₂ > … segments, a window of T keeps T/k₁ positions, then k₁/k₂ of the slice being recomputed,
and so on, and the graph of one innermost slice. Each level reads the text once more.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from dynlm.types import InputError

MIB = 2**20
MOST_LEVELS = 3


class SliceCost(NamedTuple):
    """Bytes that one position, and the graph of one segment, keep."""

    position: int
    segment: int
    nodes: int = 0
    """of a segment's graph without its tensors: what stays of every segment, whatever the slices"""

    def peak(self, window: int, slices: tuple[int, ...]) -> int:
        """Bytes kept at the most while a window is unrolled and differentiated."""
        total, length = 0, window
        for n in slices:
            total += math.ceil(length / n) * self.position
            length = min(n, length)
        return total + length * self.segment + window * self.nodes


def choose_slices(window: int, cost: SliceCost, budget: int) -> tuple[int, ...]:
    """The fewest levels whose peak fits ``budget`` bytes, with the lengths that take least; () keeps the whole graph.

    Raises:
        InputError: even the leanest choice does not fit.
    """
    best: tuple[int, ...] = ()
    for levels in range(MOST_LEVELS + 1):
        best = leanest(window, cost, levels)
        if cost.peak(window, best) <= budget:
            return best
    raise InputError(
        f"a window of {window} segments needs {cost.peak(window, best) / MIB:,.0f} MiB in slices of "
        f"{' and '.join(map(str, best))}, the budget is {budget / MIB:,.0f}: shorten meta.truncation or raise "
        "meta.estimator.memory"
    )


def leanest(window: int, cost: SliceCost, levels: int) -> tuple[int, ...]:
    """The slice lengths with the lowest peak among powers of √2, so many levels deep."""
    if levels == 0:
        return ()
    lengths = sorted({min(window, round(2 ** (i / 2))) for i in range(2 * math.ceil(math.log2(window + 1)) + 1)})
    options: list[tuple[int, ...]] = [()]
    for _ in range(levels):
        options = [(*o, n) for o in options for n in lengths if not o or n < o[-1]] or options
    return min(options, key=lambda slices: (cost.peak(window, slices), slices))


def give_back_memory() -> None:
    """Return what is free to the system, where the C library is glibc; elsewhere nothing happens.

    The small tensors of a graph lie between the large ones, and the holes that these leave are seldom filled again: 96
    segments of a 1.57M-weight model in slices of 24 and 4 take 294 MiB; the process grew by 306 MiB, else by 1,561.
    """
    _malloc_trim()(0)


@cache
def _malloc_trim() -> Callable[[int], int]:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows has none under this name
        return lambda pad: 0
    return trim
