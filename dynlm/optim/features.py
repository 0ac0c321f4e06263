"""Inputs of learned cells: squashing, and row, column and tensor statistics of a gradient.

Everything evaluated once a coordinate uses only + − × ÷ and |x|: transcendental functions set the price of a fused step
(docs/LOG.md). Logarithms appear where they are evaluated once a row or once a tensor.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynlm.compiler import build, pointers, supported
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
    surprise = clock.loss - clock.baseline
    scalars = [0.0, surprise / (1 + abs(surprise)), math.log2(clock.step) / 8, 1.0]
    look = _look_in_c if supported(grad) else _look
    seen = look(grad, memory, torch.tensor(scalars, dtype=grad.dtype, device=grad.device))
    return seen, memory._replace(row_memory=seen.row[1])


def _look(grad: Tensor, memory: Statistics, scalars: Tensor) -> Observation:
    """Row activity and its running mean, column activity; tensor activity goes into ``scalars[0]``. The plain form."""
    row_square = grad.square().mean(1, keepdim=True)
    row = _activity(row_square, memory.row_level)
    col = _activity(_some_rows(grad).square().mean(0, keepdim=True), memory.col_level)
    row_memory = MEMORY_DECAY * memory.row_memory + (1 - MEMORY_DECAY) * row
    scalars[0] = _activity(row_square.mean(), memory.tensor_level)
    return Observation((row, row_memory), (col,), scalars)


_SOURCE = """
static T activity(T square, T level, T tiny) {
  const T x = (T)0.25 * LOG2((square + tiny) / (level + tiny));
  return x / (1 + ABS(x));
}
void look(long R, long C, long stride, int threads, double tiny, double decay, T **data) {
  const T *grad = data[0], *row_level = data[1], *col_level = data[2], *level = data[3], *memory = data[4];
  T *row = data[5], *row_memory = data[6], *col = data[7], *scalars = data[8];
  #pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < R; r++) {
    T square = 0;
    #pragma omp simd reduction(+: square)
    for (long c = 0; c < C; c++) square += grad[r * C + c] * grad[r * C + c];
    row[r] = square;
  }
  double sum = 0;  /* in the order of rows, whatever the threads did: sums are repeatable */
  for (long r = 0; r < R; r++) {
    sum += row[r];
    row[r] = activity(row[r] / C, row_level[r], tiny);
    row_memory[r] = (T)decay * memory[r] + (1 - (T)decay) * row[r];
  }
  scalars[0] = activity(sum / ((double)R * C), *level, tiny);
  for (long c = 0; c < C; c++) col[c] = 0;
  for (long r = 0; r < R; r += stride)
    for (long c = 0; c < C; c++) col[c] += grad[r * C + c] * grad[r * C + c];
  const long n = (R + stride - 1) / stride;
  for (long c = 0; c < C; c++) col[c] = activity(col[c] / n, col_level[c], tiny);
}
"""


def _look_in_c(grad: Tensor, memory: Statistics, scalars: Tensor) -> Observation:
    """The same in one pass over the gradient."""
    rows, columns = grad.shape
    row, row_memory, col = (
        torch.empty_like(memory.row_level),
        torch.empty_like(memory.row_level),
        grad.new_empty(1, columns),
    )
    tensors = [grad.contiguous(), memory.row_level, memory.col_level, memory.tensor_level, memory.row_memory]
    build(_SOURCE, grad.dtype).look(
        ctypes.c_long(rows),
        ctypes.c_long(columns),
        ctypes.c_long(_stride(rows)),
        ctypes.c_int(torch.get_num_threads()),
        ctypes.c_double(_tiny(grad.dtype)),
        ctypes.c_double(MEMORY_DECAY),
        pointers([*tensors, row, row_memory, col, scalars]),
    )
    return Observation((row, row_memory), (col,), scalars)


def _stride(n_rows: int) -> int:
    """Between the rows that column statistics look at: about 256 of them are enough for a mean."""
    return max(1, n_rows // 256)


def _some_rows(matrix_RC: Tensor) -> Tensor:
    return matrix_RC[:: _stride(matrix_RC.shape[0])]


def _tiny(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).tiny ** 0.5)


def _activity(square: Tensor, level: Tensor) -> Tensor:
    """A quarter of the log2-ratio of two mean squares, squashed: 0 at the static level."""
    tiny = _tiny(square.dtype)
    return softsign(0.25 * torch.log2((square + tiny) / (level + tiny)))
