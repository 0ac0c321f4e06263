"""Two readings of the same articles compared: intervals, and tests. Definitions:

interval           95 % percentile bootstrap over articles: articles, not tokens, are drawn
p                  two-sided sign-flip permutation test of the summed gain over articles (Fisher 1935)
p_holm             p as Holm (1979) corrects it for all comparisons made together
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

N_BOOTSTRAP = 4000
N_FLIPS = 10_000
EXACT_FLIPS = 13
"""up to this many articles all 2^n signs are tried"""


def bootstrap_ratio(sums: Tensor, sizes: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % interval of Σ sums / Σ sizes over articles drawn with replacement; both (articles,)."""
    n = sums.numel()
    draws = torch.randint(n, (N_BOOTSTRAP, n), generator=torch.Generator().manual_seed(seed))
    ratios = sums.double()[draws].sum(1) / sizes.double()[draws].sum(1).clamp(min=1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def paired_gain(baseline: Sequence[Tensor], method: Sequence[Tensor]) -> tuple[float, tuple[float, float]]:
    """(gain in nats per token, its 95 % interval); each argument is one (T,) tensor an article, on the same tokens."""
    sums = torch.stack([(b.double() - m.double()).sum() for b, m in zip(baseline, method, strict=True)])
    sizes = torch.tensor([losses_T.numel() for losses_T in baseline])
    return float(sums.sum() / sizes.sum()), bootstrap_ratio(sums, sizes)


def sign_flip_p(gains_A: Tensor, seed: int = 0) -> float:
    """Two-sided p of Σ gains (articles,) if each article's gain were as likely to have the other sign.

    Exact up to 13 articles, where it cannot fall below 2 / 2^n; from 10,000 random signs above.
    """
    n = gains_A.numel()
    if n <= EXACT_FLIPS:
        signs = (torch.arange(2**n)[:, None] >> torch.arange(n)) % 2 * 2.0 - 1
        extra = 0
    else:
        signs = torch.randint(2, (N_FLIPS, n), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        extra = 1  # the signs as they are
    sums = (signs.double() @ gains_A.double()).abs()
    seen = float(gains_A.double().sum().abs())
    at_least = int((sums >= seen * (1 - 1e-12)).sum())
    return (at_least + extra) / (len(signs) + extra)


def holm(p_values: Sequence[float]) -> list[float]:
    """Step-down corrected p-values, in the order given: the family-wise error stays below each threshold."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected
