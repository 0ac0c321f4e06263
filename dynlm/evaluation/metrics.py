"""Perplexities, paired gains and their bootstrap intervals. Definitions:

token perplexity   exp(nats / tokens)                       depends on the tokenizer
word perplexity    exp(nats / (words + one <eos> a line))   comparable between tokenizers
bits per byte      nats / bytes / ln 2                      comparable between texts
gain               static loss − method loss on the same tokens, nats per token; positive is better
interval           95 % percentile bootstrap over articles: articles, not tokens, are drawn
p                  two-sided sign-flip permutation test of the summed gain over articles (Fisher 1935)
p_holm             p as Holm (1979) corrects it for all comparisons made together
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynlm.results import Perplexities, Stretch
from dynlm.types import TokenizedArticle, perplexity

N_BOOTSTRAP = 4000
N_FLIPS = 10_000
EXACT_FLIPS = 13
"""up to this many articles all 2^n signs are tried"""
POSITION_EDGES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Counts(NamedTuple):
    """Exact totals of the evaluated text; ``words`` includes one end-of-line a line."""

    articles: int
    tokens: int
    words: int
    bytes: int


def count(articles: Sequence[TokenizedArticle]) -> Counts:
    return Counts(
        len(articles), sum(map(len, articles)), sum(a.n_words for a in articles), sum(a.n_bytes for a in articles)
    )


def perplexities(nats: float, counts: Counts, lossless: bool = True) -> Perplexities:
    """Return the total in nats as token perplexity, word perplexity and bits per byte, as JSON holds them.

    A perplexity beyond all numbers is None, and so are bits per byte where the tokens do not spell the text
    (``lossless``): the bytes that were lost were not scored.
    """
    by_token, by_word = perplexity(nats, counts.tokens), perplexity(nats, counts.words)
    return {
        "nats": nats,
        "token_ppl": by_token if math.isfinite(by_token) else None,
        "word_ppl": by_word if math.isfinite(by_word) else None,
        "bits_per_byte": nats / counts.bytes / math.log(2) if lossless else None,
    }


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


def gain_by_position(baseline: Sequence[Tensor], method: Sequence[Tensor]) -> list[Stretch]:
    """The paired gain in bins of the token's position in its article; bins that no article reaches are left out."""
    bins: list[Stretch] = []
    for start, end in zip(POSITION_EDGES, [*POSITION_EDGES[1:], None], strict=True):
        pairs = [(b[start:end].double(), m[start:end].double()) for b, m in zip(baseline, method, strict=True)]
        pairs = [(b, m) for b, m in pairs if b.numel()]
        if not pairs:
            break
        sums = torch.stack([(b - m).sum() for b, m in pairs])
        sizes = torch.tensor([b.numel() for b, _ in pairs])
        bins.append(
            {
                "from": start,
                "to": end if end is not None else max(losses_T.numel() for losses_T in baseline),
                "tokens": int(sizes.sum()),
                "articles": len(pairs),
                "gain": float(sums.sum() / sizes.sum()),
                "ci95": list(bootstrap_ratio(sums, sizes)),
            }
        )
    return bins
