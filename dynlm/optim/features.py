"""Inputs of learned cells: squashing, and row, column and tensor statistics of a gradient.

Everything evaluated once a coordinate uses only + − × ÷ and |x|: transcendental functions set the price of a fused step
(docs/LOG.md). Logarithms appear where they are evaluated once a row or once a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynlm.optim.base import Clock, Observation, Prior

N_ROW, N_COL, N_SCALARS = 2, 1, 4
MEMORY_DECAY = 0.95  # of the running row statistic, per segment


def softsign(x: Tensor) -> Tensor:
    """x / (1 + |x|): a squash to (−1, 1) that costs one division."""
    return x / (1 + x.abs())


def affine(features: Sequence[Tensor], weight_OF: Tensor, bias_O: Tensor, expand: bool) -> list[Tensor]:
    """``weight @ features + bias`` a coordinate, as O tensors.

    ``expand`` writes the product out in scalars, which a compiler fuses into one pass over memory; the plain form is a
    matrix product. Features must broadcast against each other.
    """
    if not expand:
        stacked = torch.stack(torch.broadcast_tensors(*features), dim=-1)
        return list(torch.nn.functional.linear(stacked, weight_OF, bias_O).unbind(-1))
    outputs = []
    for o in range(weight_OF.shape[0]):
        total = bias_O[o] + weight_OF[o, 0] * features[0]
        for f, feature in enumerate(features[1:], 1):
            total = total + weight_OF[o, f] * feature
        outputs.append(total)
    return outputs


class Statistics(NamedTuple):
    """Reference levels of one tensor and the running row statistic."""

    row_level: Tensor
    """static mean square of the gradient by row (R, 1)"""
    col_level: Tensor
    """the same by column (1, C), over the rows that column statistics look at"""
    tensor_level: Tensor
    """the same over the tensor, ()"""
    row_memory: Tensor
    """running mean of the row feature (R, 1)"""


def observe_matrix(
    grad: Tensor, prior: Prior, memory: Statistics | None, clock: Clock
) -> tuple[Observation, Statistics]:
    """Row, column and tensor activity relative to the static level, all in (−1, 1), and four scalars.

    In an embedding a row is a word: its activity says whether the word stands in the segment, its memory whether it
    stood in the article before. Scalars: tensor activity, loss surprise, time since the article's start, and one.
    """
    if memory is None:
        level = prior.rms.square()
        memory = Statistics(
            level.mean(1, keepdim=True),
            _some_rows(level).mean(0, keepdim=True),
            level.mean(),
            torch.zeros_like(level[:, :1]),
        )
    row_square = torch.linalg.vector_norm(grad, dim=1, keepdim=True).square() / grad.shape[1]
    row = _activity(row_square, memory.row_level)
    col = _activity(_some_rows(grad).square().mean(0, keepdim=True), memory.col_level)
    row_memory = MEMORY_DECAY * memory.row_memory + (1 - MEMORY_DECAY) * row
    assert clock.loss is not None
    assert clock.baseline is not None
    surprise = softsign(clock.loss - clock.baseline)
    time = grad.new_tensor(float(clock.step)).log2() / 8
    scalars = torch.stack(
        [_activity(row_square.mean(), memory.tensor_level), surprise.to(grad), time, torch.ones_like(time)]
    )
    observation = Observation(row=(row, row_memory), col=(col,), scalars=scalars)
    return observation, memory._replace(row_memory=row_memory)


def _some_rows(matrix_RC: Tensor) -> Tensor:
    """At most about 256 rows, evenly spread: enough for a mean over rows, and one pass over memory less."""
    return matrix_RC[:: max(1, matrix_RC.shape[0] // 256)]


def _activity(square: Tensor, level: Tensor) -> Tensor:
    """Half the log-ratio of two mean squares, squashed: 0 at the static level."""
    tiny = torch.finfo(square.dtype).tiny ** 0.5
    return softsign(0.25 * torch.log2((square + tiny) / (level + tiny)))
