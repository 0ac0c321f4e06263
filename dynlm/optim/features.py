"""Inputs of learned cells: squashing, and row, column and tensor statistics of a gradient.

Everything evaluated once a coordinate uses only + − × ÷ and |x|: transcendental functions set the price of a fused step
(docs/LOG.md). Logarithms appear where they are evaluated once a row or once a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynlm.kernels import Array, Double, Kernel, Long
from dynlm.optim.base import Clock, Prior, Seen, Slots, softened

N_ROW, N_COL, N_SCALARS = 2, 1, 4
MEMORY_DECAY = 0.95  # of the running row statistic, per segment
NEGLIGIBLE = 1e-10  # of a tensor's mean square: below it is rounding noise, as in a key bias, which moves no attention


def softsign(x: Tensor) -> Tensor:
    """x / (1 + |x|): a squash to (−1, 1) that costs one division."""
    return x / (1 + x.abs())


def affine(features: Sequence[Tensor], weight_OF: Tensor, bias: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """``weight @ features + bias`` a coordinate, as O tensors.

    ``bias`` has O entries, or is O tensors that broadcast against the features, as these do. Where a compiler listens
    (symbols of dynlm.optim.trace, or ``torch.compile``), the product is written out in scalars, which it fuses into one
    pass over memory.
    """
    if isinstance(weight_OF, Tensor) and not torch.compiler.is_compiling():
        stacked = torch.stack(torch.broadcast_tensors(*features), dim=-1)
        outputs = torch.nn.functional.linear(stacked, weight_OF).unbind(-1)
        return [output + bias[o] for o, output in enumerate(outputs)]
    results = []
    for o in range(weight_OF.shape[0]):
        total = bias[o]  # first: what is the same along a row is then added up once a row
        for f, feature in enumerate(features):
            total = total + weight_OF[o, f] * feature
        results.append(total)
    return results


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


def look(
    grads: Sequence[Tensor], priors: Sequence[Prior], memory: list[Statistics] | None, clock: Clock
) -> tuple[Seen, list[Statistics]]:
    """Row, column and tensor activity relative to the static level, all in (−1, 1), and four scalars a tensor.

    In an embedding a row is a word: its activity says whether the word stands in the segment, its memory whether it
    stood in the article before. Scalars: tensor activity, loss surprise, time since the article's start, which stops
    after 256 segments, and one.
    """
    memory = memory or [_levels(prior) for prior in priors]
    surprise = clock.loss - clock.baseline
    surprise = surprise if math.isfinite(surprise) else 0.0  # an optimizer may be called without a loss
    time = min(math.log2(clock.step) / 8, 1.0)  # no rule was trained on what comes later (docs/LOG.md)
    scalars = [0.0, softened(surprise), time, 1.0]
    look_at = _look_in_c if _LOOK.serves(*grads) else _look
    rows, cols, activity_n = look_at(grads, memory)
    scalars_nS = grads[0].new_tensor([scalars]).repeat(len(grads), 1)
    scalars_nS[:, 0] = activity_n
    after = [m._replace(row_memory=row[1]) for m, row in zip(memory, rows, strict=True)]
    return Seen(tuple(rows), tuple(cols), scalars_nS), after


def _levels(prior: Prior) -> Statistics:
    level = prior.rms.square()
    of_row, of_col = level.mean(1, keepdim=True), _some_rows(level).mean(0, keepdim=True)
    return Statistics(of_row, of_col, level.mean(), torch.zeros_like(of_row))


def _look(grads: Sequence[Tensor], memory: Sequence[Statistics]) -> tuple[list[Slots], list[Slots], Tensor]:
    """Row activity and its running mean, column activity, tensor activity (n,). The plain form."""
    rows, cols, tensors = list[Slots](), list[Slots](), []
    for grad, m in zip(grads, memory, strict=True):
        row_square, least = grad.square().mean(1, keepdim=True), NEGLIGIBLE * m.tensor_level + _tiny(grad.dtype)
        row = _activity(row_square, m.row_level, least)
        rows.append((row, MEMORY_DECAY * m.row_memory + (1 - MEMORY_DECAY) * row))
        cols.append((_activity(_some_rows(grad).square().mean(0, keepdim=True), m.col_level, least),))
        tensors.append(_activity(row_square.mean(), m.tensor_level, least))
    return rows, cols, torch.stack(tensors)


_LOOK = Kernel(
    "look",
    """
  #pragma omp parallel num_threads(threads)
  {
    for (long k = 0; k < n; k++) {
      EACH(k)
      #pragma omp for schedule(static) nowait
      for (long r = 0; r < R; r++) {
        T square = 0;
        #pragma omp simd reduction(+: square)
        for (long c = 0; c < C; c++) square += grad[r * C + c] * grad[r * C + c];
        row[r] = square;
      }
    }
    #pragma omp barrier
    #pragma omp for schedule(dynamic)
    for (long k = 0; k < n; k++) {  /* a tensor is one thread's, in the order of rows: sums are repeatable */
      EACH(k)
      const T least = (T)NEGLIGIBLE * *tensor_level + (T)tiny;
      double sum = 0;
      for (long r = 0; r < R; r++) sum += row[r];
      for (long r = 0; r < R; r++) {
        row[r] = activity_of(row[r] / C, row_level[r], least);
        row_memory[r] = (T)decay * memory[r] + (1 - (T)decay) * row[r];
      }
      activity[k] = activity_of(sum / ((double)R * C), *tensor_level, least);
      for (long c = 0; c < C; c++) col[c] = 0;
      for (long r = 0; r < R; r += stride)
        for (long c = 0; c < C; c++) col[c] += grad[r * C + c] * grad[r * C + c];
      const long seen = (R + stride - 1) / stride;
      for (long c = 0; c < C; c++) col[c] = activity_of(col[c] / seen, col_level[c], least);
    }
  }""",
    (Long("threads"), Double("tiny"), Double("decay"), Array("activity", "n", out=True)),
    (
        *map(Long, ("R", "C", "stride")),
        Array("grad", "R, C"),
        Array("row_level", "R, 1"),
        Array("col_level", "1, C"),
        Array("tensor_level"),
        Array("memory", "R, 1"),
        Array("row", "R, 1", out=True),
        Array("row_memory", "R, 1", out=True),
        Array("col", "1, C", out=True),
    ),
    head=f"""#define NEGLIGIBLE {NEGLIGIBLE}
static T activity_of(T square, T level, T least) {{
  const T x = (T)0.25 * LOG2((square + least) / (level + least));
  return x / (1 + ABS(x));
}}""",
)


def _look_in_c(grads: Sequence[Tensor], memory: Sequence[Statistics]) -> tuple[list[Slots], list[Slots], Tensor]:
    """Return the same in one pass over the gradients."""
    first = grads[0]
    n_rows, n_columns = zip(*(grad.shape for grad in grads), strict=True)
    row, row_memory = (first.new_empty(sum(n_rows), 1).split(n_rows) for _ in range(2))
    col = first.new_empty(1, sum(n_columns)).split(n_columns, 1)
    activity_n = first.new_empty(len(grads))
    row_level, col_level, tensor_level, before = zip(*memory, strict=True)
    of_memory = {"row_level": row_level, "col_level": col_level, "tensor_level": tensor_level, "memory": before}
    _LOOK(
        {"threads": torch.get_num_threads(), "tiny": _tiny(first.dtype), "decay": MEMORY_DECAY, "activity": activity_n},
        {"R": n_rows, "C": n_columns, "stride": [_stride(n) for n in n_rows], "grad": grads}
        | {"row": row, "row_memory": row_memory, "col": col, **of_memory},
    )
    return list(zip(row, row_memory, strict=True)), [(c,) for c in col], activity_n


def _stride(n_rows: int) -> int:
    """Between the rows that column statistics look at: about 256 of them are enough for a mean."""
    return max(1, n_rows // 256)


def _some_rows(matrix_RC: Tensor) -> Tensor:
    return matrix_RC[:: _stride(matrix_RC.shape[0])]


def _tiny(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).tiny ** 0.5)


def _activity(square: Tensor, level: Tensor, least: Tensor) -> Tensor:
    """Return a quarter of the log2-ratio of two mean squares, squashed: 0 at the static level."""
    return softsign(0.25 * torch.log2((square + least) / (level + least)))
