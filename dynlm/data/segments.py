"""Cutting token streams: batches of parallel streams for base training, segments of one article for reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dynlm.types import InputError, TokenizedArticle


def article_segments(ids_T: torch.Tensor, start_id: int, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (inputs_S, targets_S) of one article: every token is a target exactly once, in order.

    ``start_id`` is the input that predicts the first token. The last segment may be shorter.
    """
    if size < 1:
        raise InputError(f"segment size {size}: expected at least 1 token")
    inputs_T = torch.cat([ids_T.new_tensor([start_id]), ids_T[:-1]])
    yield from zip(inputs_T.split(size), ids_T.split(size), strict=True)


def training_streams(articles: Sequence[TokenizedArticle], n_streams: int, seed: int) -> torch.Tensor:
    """Articles in an order drawn from ``seed``, joined and cut into parallel streams: (n_streams, length) ids.

    The remainder that fills no column (fewer than ``n_streams`` tokens) is left out; another seed leaves out another.
    """
    order = torch.randperm(len(articles), generator=torch.Generator().manual_seed(seed))
    stream = torch.cat([articles[int(i)].ids_T for i in order]) if articles else torch.empty(0, dtype=torch.int64)
    length = stream.numel() // n_streams
    if length < 2:
        message = f"{stream.numel()} training tokens cannot fill {n_streams} streams: give more text, or fewer streams"
        raise InputError(message, setting="train.batch_size")
    return stream[: n_streams * length].view(n_streams, length)
