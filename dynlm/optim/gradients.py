"""What LearnedOptimizer looks at in all gradients at once: whether they are finite, and their running RMS."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dynlm.kernels import Array, Double, Kernel, Long

RMS_DECAY = 0.999  # of the running RMS, per step
BLOCK = 4096  # coordinates that a thread takes at a time


def _by_block(body: str) -> str:
    """Return C that runs ``body`` for the coordinates from ``start`` to ``end`` of each tensor k, on all threads."""
    return f"""
  #pragma omp parallel num_threads(threads)
  for (long k = 0; k < n; k++) {{
    EACH(k)
    #pragma omp for schedule(static) nowait
    for (long start = 0; start < R * C; start += {BLOCK}) {{
      const long end = start + {BLOCK} < R * C ? start + {BLOCK} : R * C;{body}
    }}
  }}"""


_FINITE = Kernel(
    "not_finite",
    _by_block("""
      int wrong = 0;
      #pragma omp simd reduction(|: wrong)
      for (long i = start; i < end; i++) wrong |= !(ABS(grad[i]) <= LARGEST);  /* written so that a NaN is wrong */
      if (wrong) {
        #pragma omp atomic write
        found[k] = 1;
      }"""),
    (Long("threads"), Array("found", "n", "int", out=True)),
    (Long("R"), Long("C"), Array("grad", "R, C")),
    head="#include <float.h>\n#define LARGEST (sizeof(T) == sizeof(float) ? (T)FLT_MAX : (T)DBL_MAX)",
)

_RUNNING = Kernel(
    "running",
    _by_block("""
      T part = 0;
      #pragma omp simd reduction(+: part)
      for (long i = start; i < end; i++) {
        rms[i] = SQRT(rms[i] * rms[i] * (T)past + (1 - (T)past) * grad[i] * grad[i]);
        part += rms[i];
      }
      sums[k * threads + omp_get_thread_num()] += part;"""),
    (Long("threads"), Double("past"), Array("sums", "n, threads", "double", out=True)),
    (Long("R"), Long("C"), Array("grad", "R, C"), Array("rms", "R, C", out=True)),
)


def first_not_finite(grads: Sequence[Tensor]) -> int | None:
    """Return the number of the first gradient (R, C) that is not finite.

    On a GPU none is: to look would wait for it at every step.
    """
    if _FINITE.serves(*grads):
        found = torch.zeros(len(grads), dtype=torch.int32)
        _FINITE({"threads": torch.get_num_threads(), "found": found}, {**_sizes(grads), "grad": grads})
        return int(found.nonzero()[0]) if found.any() else None
    wrong = (k for k, g in enumerate(grads) if not g.is_cuda and not (math.isfinite(g.sum()) or g.isfinite().all()))
    return next(wrong, None)


def running_rms(rms: Sequence[Tensor], grads: Sequence[Tensor], step: int) -> list[float]:
    """Take gradients into the bias-corrected running RMS of each tensor after ``step`` steps; returns their means."""
    past = RMS_DECAY * (1 - RMS_DECAY**step) / (1 - RMS_DECAY ** (step + 1))
    if _RUNNING.serves(*rms):
        threads = torch.get_num_threads()
        sums = torch.zeros(len(rms), threads, dtype=torch.float64)
        _RUNNING({"threads": threads, "past": past, "sums": sums}, {**_sizes(rms), "grad": grads, "rms": rms})
        return [total / r.numel() for total, r in zip(sums.sum(1).tolist(), rms, strict=True)]
    for r, grad in zip(rms, grads, strict=True):
        r.square_().mul_(past).addcmul_(grad, grad, value=1 - past).sqrt_()
    means: list[float] = torch.stack([r.mean() for r in rms]).tolist()
    return means


def _sizes(tensors: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    return dict(zip(("R", "C"), zip(*(t.shape for t in tensors), strict=True), strict=True))
