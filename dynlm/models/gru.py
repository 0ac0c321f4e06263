"""One GRU layer over short sequences of many small networks: a fused kernel, and the same in torch.

torch's own CPU kernel spends its time on calls: a hundred of them a step of eight numbers. Here the recurrence is one
loop in C each way, or where there is no compiler (or for other types) a few torch calls a step. What multiplies ∂h is
known before the way back begins, so a step back is one elementwise product and one matrix product.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynlm.compiler import build, pointers, supported


def gru(gates_SBG: Tensor, recurrent_GD: Tensor) -> Tensor:
    """States (S, B, D) from h = 0: r, z = σ(x_rz + U_rz h), n = tanh(x_n + r ⊙ U_n h), h ← n + z ⊙ (h − n).

    ``gates_SBG`` holds x (G = 3 D: r, z, n), ``recurrent_GD`` U. Differentiable once.
    """
    states_SBD: Tensor = _GRU.apply(gates_SBG, recurrent_GD)  # type: ignore[no-untyped-call]
    return states_SBD


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates_SBG: Tensor, recurrent_GD: Tensor) -> Tensor:
        n_steps, n_batch, n_gates = gates_SBG.shape
        states = gates_SBG.new_zeros(n_steps + 1, n_batch, n_gates // 3)
        multiples = gates_SBG.new_empty(n_steps, n_batch, n_gates // 3 * 5)
        run = _forward_in_c if in_c(gates_SBG) else _forward
        run(gates_SBG.contiguous(), recurrent_GD, states, multiples)
        ctx.save_for_backward(states, multiples, recurrent_GD)
        return states[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SBD: Tensor) -> tuple[Tensor, Tensor]:
        states, multiples, recurrent_GD = ctx.saved_tensors
        n_steps, n_batch, width = grad_SBD.shape
        grads = grad_SBD.new_empty(n_steps, n_batch, 4 * width)
        run = _backward_in_c if in_c(grad_SBD) else _backward
        run(grad_SBD.contiguous(), recurrent_GD.contiguous(), multiples, grads)
        flat = grads.view(n_steps * n_batch, 4 * width)
        grad_recurrent = flat[:, width:].t() @ states[:-1].view(n_steps * n_batch, width)
        # of x: r and z as of U h, n its own
        grad_gates = torch.cat([flat[:, width : 3 * width], flat[:, :width]], 1)
        return grad_gates.view(n_steps, n_batch, 3 * width), grad_recurrent


def in_c(like: Tensor) -> bool:
    return like.dtype == torch.float32 and supported(like)


def _forward(gates_SBG: Tensor, recurrent_GD: Tensor, states: Tensor, multiples: Tensor) -> None:
    """Fills ``states`` (S + 1, B, D) but the first, and ``multiples`` (S, B, 5 D) of ∂h: in ∂ of x_n, of U h, of h."""
    n_steps, width = len(gates_SBG), states.shape[2]
    recurrent_DG = recurrent_GD.t()
    for t in range(n_steps):
        h, (x_r, x_z, x_n) = states[t], gates_SBG[t].split(width, 1)
        u_r, u_z, u_n = (h @ recurrent_DG).split(width, 1)
        r, z = torch.sigmoid(x_r + u_r), torch.sigmoid(x_z + u_z)
        n = torch.tanh(torch.addcmul(x_n, r, u_n))
        torch.lerp(n, h, z, out=states[t + 1])
        by_n = (1 - z) * (1 - n * n)
        parts = [by_n, by_n * u_n * r * (1 - r), (h - n) * z * (1 - z), by_n * r, z]
        torch.cat(parts, 1, out=multiples[t])


def _backward(grad_SBD: Tensor, recurrent_GD: Tensor, multiples: Tensor, grads: Tensor) -> None:
    """Fills ``grads`` (S, B, 4 D): ∂ of x_n, then of U h, whose r and z are also those of x."""
    n_steps, n_batch, width = grad_SBD.shape
    grad_h = torch.zeros_like(grad_SBD[0])
    for t in reversed(range(n_steps)):
        grad_h = grad_h + grad_SBD[t]
        every = multiples[t].view(n_batch, 5, width) * grad_h[:, None]
        grads[t] = every[:, :4].flatten(1)
        grad_h = torch.addmm(every[:, 4], grads[t, :, width:], recurrent_GD)


_SOURCE = """
void forward(long S, long B, long D, T **data) {
  const T *x = data[0], *U = data[1];  /* U transposed: (D, 3 D) */
  T *states = data[2], *multiples = data[3];
  T *restrict u = malloc(3 * D * sizeof(T));
  for (long i = 0; i < S * B; i++) {
    const T *restrict h = states + i * D, *restrict g = x + i * 3 * D;
    T *restrict next = states + (i + B) * D, *restrict m = multiples + i * 5 * D;
    for (long k = 0; k < 3 * D; k++) u[k] = 0;
    for (long d = 0; d < D; d++) {
      const T a = h[d], *restrict w = U + d * 3 * D;
      for (long k = 0; k < 3 * D; k++) u[k] += a * w[k];
    }
    for (long j = 0; j < D; j++) {
      const T r = 1 / (1 + expf(-g[j] - u[j])), z = 1 / (1 + expf(-g[D + j] - u[D + j]));
      const T fed = u[2 * D + j], n = 1 - 2 / (1 + expf(2 * (g[2 * D + j] + r * fed))), by_n = (1 - z) * (1 - n * n);
      next[j] = n + z * (h[j] - n);
      m[j] = by_n;
      m[D + j] = by_n * fed * r * (1 - r);
      m[2 * D + j] = (h[j] - n) * z * (1 - z);
      m[3 * D + j] = by_n * r;
      m[4 * D + j] = z;
    }
  }
  free(u);
}
void backward(long S, long B, long D, T **data) {
  const T *grad = data[0], *U = data[1], *multiples = data[2];
  T *grads = data[3];
  T *restrict grad_h = calloc(B * D, sizeof(T));
  for (long i = S * B - 1; i >= 0; i--) {
    T *restrict h = grad_h + i % B * D, *restrict out = grads + i * 4 * D;
    const T *restrict m = multiples + i * 5 * D, *restrict seen = grad + i * D;
    for (long j = 0; j < D; j++) h[j] += seen[j];
    for (long k = 0; k < 4; k++)
      for (long j = 0; j < D; j++) out[k * D + j] = m[k * D + j] * h[j];
    for (long j = 0; j < D; j++) h[j] *= m[4 * D + j];
    for (long k = 0; k < 3 * D; k++) {
      const T a = out[D + k], *restrict w = U + k * D;
      for (long j = 0; j < D; j++) h[j] += a * w[j];
    }
  }
  free(grad_h);
}
"""


def _forward_in_c(gates_SBG: Tensor, recurrent_GD: Tensor, states: Tensor, multiples: Tensor) -> None:
    tensors = [gates_SBG, recurrent_GD.t().contiguous(), states, multiples]
    build(_SOURCE, gates_SBG.dtype).forward(*map(ctypes.c_long, states[1:].shape), pointers(tensors))


def _backward_in_c(grad_SBD: Tensor, recurrent_GD: Tensor, multiples: Tensor, grads: Tensor) -> None:
    tensors = [grad_SBD, recurrent_GD, multiples, grads]
    build(_SOURCE, grad_SBD.dtype).backward(*map(ctypes.c_long, grad_SBD.shape), pointers(tensors))
