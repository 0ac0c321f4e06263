"""Stratified samples of coordinates: one stratum a tensor, weighted by inverse inclusion probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Stratum(NamedTuple):
    """Sampled coordinates of one tensor: flat positions (K,), and the weight 1 / inclusion probability of each."""

    index_K: Tensor
    weight: float

    def take(self, matrix: Tensor) -> Tensor:
        """Return the sample of (R, C, …) as (K, …)."""
        return matrix.flatten(0, 1)[self.index_K]

    def part(self, number: int, parts: int) -> Stratum:
        """Return every ``parts``-th coordinate, with the weight that makes it a sample of its own."""
        index_K = self.index_K[number::parts]
        return Stratum(index_K, self.weight * self.index_K.numel() / max(1, index_K.numel()))


def sample_coordinates(
    sizes: Sequence[int], n_sampled: int, generator: torch.Generator, smallest: int = 1024
) -> list[Stratum]:
    """One stratum a tensor, in proportion to its size but at least ``smallest`` coordinates (all, if it has fewer).

    Within a tensor one coordinate is drawn from each of K equal intervals, so rows are covered evenly; a tensor whose
    share is its size is taken whole. ``n_sampled`` of 0 takes everything.
    """
    total = sum(sizes)
    strata = []
    for size in sizes:
        share = size if n_sampled == 0 else min(size, max(smallest, round(n_sampled * size / total)))
        offsets = torch.rand(share, generator=generator, dtype=torch.float64)
        index = ((torch.arange(share) + offsets) * (size / share)).long().clamp_(max=size - 1)
        strata.append(Stratum(torch.arange(size) if share == size else index, size / share))
    return strata
