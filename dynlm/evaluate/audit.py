"""Audits of the reading protocol: what must not move, does not move by a bit."""

from __future__ import annotations

import torch

from dynlm.adapt import Reader
from dynlm.types import TokenizedArticle


def first_leak(reader: Reader, article: TokenizedArticle, start_id: int, position: int, vocab_size: int) -> int | None:
    """The first position before ``position`` whose score moves when the tokens from ``position`` on change.

    Tokens at and after ``position`` are replaced by others, the article is read again from the same start, and the
    scores before it are compared bit for bit. None: causal as far as this perturbation can tell.
    """
    changed = article.ids_T.clone()
    changed[position:] = (changed[position:] + 1) % vocab_size
    other = TokenizedArticle(article.id, article.title, changed, article.n_words, article.n_bytes)
    with reader:
        reader.begin()
        before = reader.read(article, start_id)[:position]
        reader.begin()
        after = reader.read(other, start_id)[:position]
    moved = (before != after).nonzero()
    return int(moved[0]) if moved.numel() else None


def restores(reader: Reader, article: TokenizedArticle, start_id: int) -> bool:
    """Whether every weight of the model is bit for bit what it was, after reading."""
    saved = [p.detach().clone() for p in reader.model.parameters()]
    with reader:
        reader.read(article, start_id)
    return all(torch.equal(a, b) for a, b in zip(saved, reader.model.parameters(), strict=True))
