"""One GRU layer over short sequences of many small networks: a fused kernel, and the same in torch.

torch's own CPU kernel spends its time on calls: a hundred of them a step of eight numbers. Here the recurrence is one
loop in C each way, or where there is no compiler (or for other types) a few torch calls a step. What multiplies ∂h is
known before the way back begins, so a step back is one elementwise product and one matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynlm.kernels import Array, Kernel, Long
from dynlm.models.recurrence import needs_torch


def gru(gates_SBG: Tensor, recurrent_GD: Tensor) -> Tensor:
    """States (S, B, D) from h = 0: r, z = σ(x_rz + U_rz h), n = tanh(x_n + r ⊙ U_n h), h ← n + z ⊙ (h − n).

    ``gates_SBG`` holds x (G = 3 D: r, z, n), ``recurrent_GD`` U. Differentiable once,
    or as often as asked inside ``differentiable_twice`` and under ``torch.func``.
    """
    if torch.compiler.is_compiling():
        states: Tensor = _run_as_op(gates_SBG, recurrent_GD)[0]
    elif needs_torch():
        states = _forward(gates_SBG, recurrent_GD)[0]
    else:
        states = _GRU.apply(gates_SBG, recurrent_GD)  # type: ignore[no-untyped-call]
    return states[1:]


def _run(gates_SBG: Tensor, recurrent_GD: Tensor) -> tuple[Tensor, Tensor]:
    run = _forward_in_c if in_c(gates_SBG) else _forward
    return run(gates_SBG, recurrent_GD)


def _run_back(grad_SBD: Tensor, recurrent_GD: Tensor, states: Tensor, multiples: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the gates and of U from those of the states but the first."""
    n_steps, n_batch, width = grad_SBD.shape
    grads = grad_SBD.new_empty(n_steps, n_batch, 4 * width)
    run = _backward_in_c if in_c(grad_SBD) else _backward
    run(grad_SBD, recurrent_GD, multiples, grads)
    flat = grads.view(n_steps * n_batch, 4 * width)
    grad_recurrent = flat[:, width:].t() @ states[:-1].view(n_steps * n_batch, width)
    # of x: r and z as of U h, n its own
    grad_gates = torch.cat([flat[:, width : 3 * width], flat[:, :width]], 1)
    return grad_gates.view(n_steps, n_batch, 3 * width), grad_recurrent


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates_SBG: Tensor, recurrent_GD: Tensor) -> Tensor:
        states, multiples = _run(gates_SBG, recurrent_GD)
        ctx.save_for_backward(recurrent_GD, states, multiples)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _run_back(grad[1:], *ctx.saved_tensors)


def in_c(like: Tensor) -> bool:
    return like.dtype == torch.float32 and _FORWARD.serves(like) and _BACKWARD.serves(like)


def _forward(gates_SBG: Tensor, recurrent_GD: Tensor) -> tuple[Tensor, Tensor]:
    """Return (states from h = 0 on (S + 1, B, D), multiples (S, B, 5 D) of ∂h: in ∂ of x_n, of U h, of h).

    The plain form, through which autograd differentiates as often as it likes.
    """
    width, recurrent_DG = recurrent_GD.shape[1], recurrent_GD.t()
    states, multiples = [gates_SBG.new_zeros(gates_SBG.shape[1], width)], []
    for gates_BG in gates_SBG:
        h, (x_r, x_z, x_n) = states[-1], gates_BG.split(width, 1)
        u_r, u_z, u_n = (h @ recurrent_DG).split(width, 1)
        r, z = torch.sigmoid(x_r + u_r), torch.sigmoid(x_z + u_z)
        n = torch.tanh(torch.addcmul(x_n, r, u_n))
        states.append(torch.lerp(n, h, z))
        by_n = (1 - z) * (1 - n * n)
        multiples.append(torch.cat([by_n, by_n * u_n * r * (1 - r), (h - n) * z * (1 - z), by_n * r, z], 1))
    return torch.stack(states), torch.stack(multiples)


def _backward(grad_SBD: Tensor, recurrent_GD: Tensor, multiples: Tensor, grads: Tensor) -> None:
    """Fills ``grads`` (S, B, 4 D): ∂ of x_n, then of U h, whose r and z are also those of x."""
    n_steps, n_batch, width = grad_SBD.shape
    grad_h = torch.zeros_like(grad_SBD[0])
    for t in reversed(range(n_steps)):
        grad_h = grad_h + grad_SBD[t]
        every = multiples[t].view(n_batch, 5, width) * grad_h[:, None]
        grads[t] = every[:, :4].flatten(1)
        grad_h = torch.addmm(every[:, 4], grads[t, :, width:], recurrent_GD)


_FORWARD = Kernel(
    "forward",
    """
  T *restrict u = malloc(3 * D * sizeof(T));
  for (long i = 0; i < S * B; i++) {
    const T *restrict h = states + i * D, *restrict g = gates + i * 3 * D;
    T *restrict next = states + (i + B) * D, *restrict m = multiples + i * 5 * D;
    for (long k = 0; k < 3 * D; k++) u[k] = 0;
    for (long d = 0; d < D; d++) {
      const T a = h[d], *restrict w = recurrent + d * 3 * D;
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
  free(u);""",
    (
        *map(Long, "SBD"),
        Array("gates", "S, B, 3 * D"),
        Array("recurrent", "D, 3 * D"),  # transposed
        Array("states", "S + 1, B, D", out=True),
        Array("multiples", "S, B, 5 * D", out=True),
    ),
)
_BACKWARD = Kernel(
    "backward",
    """
  T *restrict grad_h = calloc(B * D, sizeof(T));
  for (long i = S * B - 1; i >= 0; i--) {
    T *restrict h = grad_h + i % B * D, *restrict out = grads + i * 4 * D;
    const T *restrict m = multiples + i * 5 * D, *restrict seen = grad + i * D;
    for (long j = 0; j < D; j++) h[j] += seen[j];
    for (long k = 0; k < 4; k++)
      for (long j = 0; j < D; j++) out[k * D + j] = m[k * D + j] * h[j];
    for (long j = 0; j < D; j++) h[j] *= m[4 * D + j];
    for (long k = 0; k < 3 * D; k++) {
      const T a = out[D + k], *restrict w = recurrent + k * D;
      for (long j = 0; j < D; j++) h[j] += a * w[j];
    }
  }
  free(grad_h);""",
    (
        *map(Long, "SBD"),
        Array("grad", "S, B, D"),
        Array("recurrent", "3 * D, D"),
        Array("multiples", "S, B, 5 * D"),
        Array("grads", "S, B, 4 * D", out=True),
    ),
)


def _forward_in_c(gates_SBG: Tensor, recurrent_GD: Tensor) -> tuple[Tensor, Tensor]:
    n_steps, n_batch, n_gates = gates_SBG.shape
    width = n_gates // 3
    states = gates_SBG.new_zeros(n_steps + 1, n_batch, width)
    multiples = gates_SBG.new_empty(n_steps, n_batch, 5 * width)
    arrays = {"gates": gates_SBG, "recurrent": recurrent_GD.t(), "states": states, "multiples": multiples}
    _FORWARD({"S": n_steps, "B": n_batch, "D": width, **arrays})
    return states, multiples


def _backward_in_c(grad_SBD: Tensor, recurrent_GD: Tensor, multiples: Tensor, grads: Tensor) -> None:
    arrays = {"grad": grad_SBD, "recurrent": recurrent_GD, "multiples": multiples, "grads": grads}
    _BACKWARD({**dict(zip("SBD", grad_SBD.shape, strict=True)), **arrays})


# torch.compile sees one operation each way, of which it knows the shapes; without it they cost more than _GRU
_run_as_op = torch.library.custom_op(
    "dynlm::gru", _run, mutates_args=(), schema="(Tensor gates, Tensor recurrent) -> (Tensor, Tensor)"
)
_run_back_as_op = torch.library.custom_op(
    "dynlm::gru_backward",
    _run_back,
    mutates_args=(),
    schema="(Tensor grad, Tensor recurrent, Tensor states, Tensor multiples) -> (Tensor, Tensor)",
)


def _shapes(gates_SBG: Tensor, recurrent_GD: Tensor) -> tuple[Tensor, Tensor]:
    n_steps, n_batch, n_gates = gates_SBG.shape
    width = n_gates // 3
    return gates_SBG.new_empty(n_steps + 1, n_batch, width), gates_SBG.new_empty(n_steps, n_batch, 5 * width)


def _gradient_shapes(
    grad_SBD: Tensor, recurrent_GD: Tensor, states: Tensor, multiples: Tensor
) -> tuple[Tensor, Tensor]:
    n_steps, n_batch, width = grad_SBD.shape
    return grad_SBD.new_empty(n_steps, n_batch, 3 * width), recurrent_GD.new_empty(recurrent_GD.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1], *output)
    ctx.mark_non_differentiable(output[1])


def _back(ctx: Any, grad: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = _run_back_as_op(grad[1:], *ctx.saved_tensors)
    return grads


_run_as_op.register_fake(_shapes)
_run_back_as_op.register_fake(_gradient_shapes)
_run_as_op.register_autograd(_back, setup_context=_save)
