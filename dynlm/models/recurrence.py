"""One LSTM layer over a sequence: torch's own kernel, and a faster backward pass for reading.

torch's CPU kernel adds a rank-one gradient to the weights at every time step. Reading has one stream, where that costs
most, so its backward pass here recomputes all gates in one product, runs the recurrence backwards on vectors, and
multiplies once for the weights (docs/LOG.md has the times). The forward pass is torch's in both cases, so scores do not
depend on the choice; gradients agree to rounding (tests/models/test_recurrence.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

State = tuple[Tensor, Tensor]

_twice: ContextVar[bool] = ContextVar("differentiable_twice", default=False)


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Inside, layers take torch's kernel, which has the second derivative that second-order meta-gradients need."""
    token = _twice.set(True)
    try:
        yield
    finally:
        _twice.reset(token)


def lstm_layer(x_BTD: Tensor, state: State, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> tuple[Tensor, State]:
    """Gates (i, f, g, o) = W_ih x + W_hh h + b. ``state``: (h, c), each (B, H). Returns (B, T, H) and the new state."""
    one_stream = x_BTD.shape[0] == 1 and x_BTD.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if one_stream and torch.is_grad_enabled() and not _twice.get() and not state[0].requires_grad:
        output, h, c = _OneStream.apply(x_BTD[0], *state, weight_ih, weight_hh, bias)  # type: ignore[no-untyped-call]
        return output[None], (h, c)
    return _torch_lstm(x_BTD, state, weight_ih, weight_hh, bias)


def _torch_lstm(
    x_BTD: Tensor, state: State, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
) -> tuple[Tensor, State]:
    h, c = state
    # torch keeps two biases; the second one is a constant zero here, so that ours is counted once
    weights = [weight_ih, weight_hh, bias, torch.zeros_like(bias)]
    output, h, c = torch.lstm(x_BTD, [h[None], c[None]], weights, True, 1, 0.0, True, False, True)
    return output, (h[0], c[0])


class _OneStream(torch.autograd.Function):
    """One stream (T, D) whose initial state (1, H) and final state carry no gradient (truncated backpropagation)."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, h0: Tensor, c0: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, (h, c) = _torch_lstm(x_TD[None], (h0, c0), weight_ih, weight_hh, bias)
        ctx.save_for_backward(x_TD, h0, c0, weight_ih, weight_hh, bias, output[0])
        ctx.mark_non_differentiable(h, c)
        return output[0], h, c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, h0, c0, weight_ih, weight_hh, bias, output_TH = ctx.saved_tensors
        before_TH = torch.cat([h0, output_TH[:-1]])
        gates = torch.addmm(bias, x_TD, weight_ih.t()).addmm_(before_TH, weight_hh.t())
        i, f, g, o = gates.chunk(4, dim=1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cells = [c0[0]]
        for candidate, forget in zip((i * g).unbind(), f.unbind(), strict=True):
            cells.append(torch.addcmul(candidate, forget, cells[-1]))
        c_before, tanh_c = torch.stack(cells[:-1]), torch.stack(cells[1:]).tanh_()
        # what one unit of ∂c (first three) or ∂h (last) sends to each gate, and ∂h to ∂c
        from_c = torch.stack([g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g)], dim=1)
        from_h = tanh_c * o * (1 - o)
        h_to_c = o * (1 - tanh_c * tanh_c)
        n_steps, width = output_TH.shape
        grad_gates = torch.empty_like(gates)
        by_gate = grad_gates.view(n_steps, 4, width)
        back = weight_hh.t()
        grad_c, grad_h = torch.zeros_like(cells[0]), grad_TH[-1]
        for t in reversed(range(n_steps)):
            grad_c = torch.addcmul(grad_c, grad_h, h_to_c[t])
            torch.mul(from_c[t], grad_c, out=by_gate[t, :3])
            torch.mul(from_h[t], grad_h, out=by_gate[t, 3])
            grad_c = grad_c * f[t]
            if t:
                grad_h = torch.addmv(grad_TH[t - 1], back, grad_gates[t])
        by_time = grad_gates.t()
        return grad_gates @ weight_ih, None, None, by_time @ x_TD, by_time @ before_TH, grad_gates.sum(0)
