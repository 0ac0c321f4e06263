"""How an unroll is cut into checkpointed slices: what a choice holds at its peak, and the choice that fits a budget.

With slices of k₁ > k₂ > … segments, a window of T keeps T/k₁ positions, then k₁/k₂ of the slice being recomputed,
and so on, and the graph of one innermost slice. Each level reads the text once more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from dynlm.allocator import MIB
from dynlm.types import InputError

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
        f"{' and '.join(map(str, best))}, the budget is {budget / MIB:,.0f}: shorten the truncation, or raise memory",
        setting="meta.estimator.memory",
    )


def leanest(window: int, cost: SliceCost, levels: int) -> tuple[int, ...]:
    """Return the slice lengths with the lowest peak among powers of √2, so many levels deep."""
    if levels == 0:
        return ()
    lengths = sorted({min(window, round(2 ** (i / 2))) for i in range(2 * math.ceil(math.log2(window + 1)) + 1)})
    options: list[tuple[int, ...]] = [()]
    for _ in range(levels):
        options = [(*o, n) for o in options for n in lengths if not o or n < o[-1]] or options
    return min(options, key=lambda slices: (cost.peak(window, slices), slices))
