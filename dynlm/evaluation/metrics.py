"""Perplexities, and gains by position. Definitions:

token perplexity   exp(nats / tokens)                       depends on the tokenizer
word perplexity    exp(nats / (words + one <eos> a line))   comparable between tokenizers
bits per byte      nats / bytes / ln 2                      comparable between texts
gain               static loss − method loss on the same tokens, nats per token; positive is better
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynlm.paired import bootstrap_ratio
from dynlm.results import Perplexities, Stretch
from dynlm.types import TokenizedArticle, perplexity

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
