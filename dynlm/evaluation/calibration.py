"""Calibration of the most probable token: expected calibration error (Guo et al. 2017, arXiv:1706.04599).

    ECE = Σ_b n_b / n |accuracy_b − confidence_b|        b: ten bins of equal width of the top probability

A method is honest about what it knows where the share of correct top tokens equals their probability.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynlm import results
from dynlm.inner import Observer, Scored
from dynlm.paired import N_BOOTSTRAP

BINS = 10


class Calibration(Observer):
    """Collects (tokens, Σ probability, correct) of each bin and article."""

    def __init__(self, articles: Sequence[Tensor] = ()) -> None:
        self.articles = list(articles)
        """sums (bins, 3) of each article, float64"""

    def begin_article(self) -> None:
        self.articles.append(torch.zeros(BINS, 3, dtype=torch.float64))

    def scored(self, scored: Scored) -> None:
        assert scored.log_probs is not None  # an observed loop taps the model
        log_prob_S, top_S = scored.log_probs().max(1)
        prob_S = log_prob_S.exp().double().cpu()
        correct_S = (top_S == scored.targets_S).double().cpu()
        bin_S = (prob_S * BINS).long().clamp(0, BINS - 1)
        self.articles[-1].index_add_(0, bin_S, torch.stack([torch.ones_like(prob_S), prob_S, correct_S], 1))

    def summary(self) -> results.Calibration:
        """Return the error, its interval over articles, and the bins that are not empty."""
        sums_AB3 = torch.stack(self.articles)
        n = len(sums_AB3)
        draws = torch.randint(n, (N_BOOTSTRAP, n), generator=torch.Generator().manual_seed(0))
        weights = torch.zeros(N_BOOTSTRAP, n, dtype=torch.float64).scatter_add_(
            1, draws, torch.ones(draws.shape).double()
        )
        drawn = (weights @ sums_AB3.flatten(1)).view(-1, BINS, 3)
        ends = torch.quantile(expected_error(drawn), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        total_B3 = sums_AB3.sum(0)
        bins: list[results.Bin] = [
            {
                "from": b / BINS,
                "to": (b + 1) / BINS,
                "tokens": int(tokens),
                "confidence": confidence / tokens,
                "accuracy": correct / tokens,
            }
            for b, (tokens, confidence, correct) in enumerate(total_B3.tolist())
            if tokens
        ]
        return {"ece": float(expected_error(total_B3)), "ci95": ends, "bins": bins}


def expected_error(sums_B3: Tensor) -> Tensor:
    """ECE of (…, bins, 3) sums."""
    tokens, confidence, correct = sums_B3.unbind(-1)
    return (correct - confidence).abs().sum(-1) / tokens.sum(-1).clamp(min=1)
