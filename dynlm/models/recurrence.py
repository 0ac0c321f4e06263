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

from dynlm.kernels import Array, Kernel, Long
from dynlm.types import InputError

State = tuple[Tensor, Tensor]

WIDE = 1024
"""from this width on, gradients of torch's bfloat16 kernel on CPUs with AMX are wrong by a third where the width is a
multiple of 128 (torch 2.13): full precision takes its place, as it does on CPUs without AVX-512, which have no such
kernel"""

_twice: ContextVar[bool] = ContextVar("differentiable_twice", default=False)


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Inside, layers take torch's kernel, which has the second derivative that second-order meta-gradients need."""
    token = _twice.set(True)
    try:
        yield
    finally:
        _twice.reset(token)


def needs_torch() -> bool:
    """Return whether only torch's own operations will do: for a second derivative, or transforms of ``torch.func``."""
    return _twice.get() or _transformed()


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


def one_stream(batch: Tensor) -> bool:
    """Whether the fast first-order paths serve this batch: one stream on a CPU, full precision, in eager mode."""
    on_cpu = batch.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return batch.shape[0] == 1 and on_cpu and not torch.compiler.is_compiling() and not needs_torch()


def lstm_layer(x_BTD: Tensor, state: State, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> tuple[Tensor, State]:
    """Gates (i, f, g, o) = W_ih x + W_hh h + b. ``state``: (h, c), each (B, H). Returns (B, T, H) and the new state.

    Raises:
        InputError: shapes that do not fit each other, which torch's kernel would read past.
    """
    _require_shapes(x_BTD, state, weight_ih, weight_hh, bias)
    first_order = torch.is_grad_enabled() and not state[0].requires_grad and not state[1].requires_grad
    if first_order and one_stream(x_BTD):
        output, h, c = _OneStream.apply(x_BTD[0], *state, weight_ih, weight_hh, bias)  # type: ignore[no-untyped-call]
        return output[None], (h, c)
    if first_order and torch.compiler.is_compiling() and x_BTD.shape[0] == 1 and x_BTD.device.type == "cpu":
        output, h, c = _run_as_op(x_BTD[0], *state, weight_ih, weight_hh, bias)
        return output[None], (h, c)
    run = _step_by_step if _transformed() else _torch_lstm
    return run(x_BTD, state, weight_ih, weight_hh, bias)


def _require_shapes(x_BTD: Tensor, state: State, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> None:
    batch, width, n_inputs = x_BTD.shape[0], weight_hh.shape[-1], x_BTD.shape[-1]
    found = (state[0].shape, state[1].shape, weight_ih.shape, weight_hh.shape, bias.shape)
    expected = ((batch, width), (batch, width), (4 * width, n_inputs), (4 * width, width), (4 * width,))
    if found != expected or x_BTD.dim() != 3:
        names = ("h", "c", "weight_ih", "weight_hh", "bias")
        wrong = [f"{n} is {list(f)}, not {list(e)}" for n, f, e in zip(names, found, expected, strict=True) if f != e]
        raise InputError(f"an LSTM layer of inputs {list(x_BTD.shape)} does not fit: {'; '.join(wrong)}")


def _has_half_kernel(width: int) -> bool:
    """Return whether this CPU's kernel runs a layer in bfloat16 and gets its gradients right (docs/LOG.md)."""
    if not torch.backends.mkldnn.is_available():
        return True
    return width < WIDE and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _torch_lstm(
    x_BTD: Tensor, state: State, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
) -> tuple[Tensor, State]:
    h, c = state
    if x_BTD.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not _has_half_kernel(weight_hh.shape[1]):
        with torch.autocast("cpu", enabled=False):
            x_BTD, h, c = (tensor.to(weight_hh.dtype) for tensor in (x_BTD, h, c))
            return _torch_lstm(x_BTD, (h, c), weight_ih, weight_hh, bias)
    # torch keeps two biases; the second one is a constant zero here, so that ours is counted once
    weights = [weight_ih, weight_hh, bias, torch.zeros_like(bias)]
    output, h, c = torch.lstm(x_BTD, [h[None], c[None]], weights, True, 1, 0.0, True, False, True)
    return output, (h[0], c[0])


def _step_by_step(
    x_BTD: Tensor, state: State, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
) -> tuple[Tensor, State]:
    """In basic operations, for transforms of ``torch.func``: torch's kernel has no rules for some of them."""
    (h, c), outputs = state, []
    for gates in torch.nn.functional.linear(x_BTD, weight_ih, bias).unbind(1):
        i, f, g, o = (gates + h @ weight_hh.t()).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs, 1), (h, c)


def _run_back(grad_TH: Tensor, gates: Tensor, c0: Tensor, weight_hh: Tensor) -> Tensor:
    """Gradients of the gates (T, 4H) from those of the outputs, last step first: the plain form.

    ``gates`` are as they were before their nonlinearities, and are used up.
    """
    n_steps, width = grad_TH.shape
    i, f, g, o = gates.chunk(4, dim=1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cells = [c0[0]]
    for candidate, forget in zip((i * g).unbind(), f.unbind(), strict=True):
        cells.append(torch.addcmul(candidate, forget, cells[-1]))
    c_before, tanh_c = torch.stack(cells[:-1]), torch.stack(cells[1:]).tanh_()
    # what one unit of ∂c sends to the gates i, f, g, and one of ∂h to the gate o and to ∂c
    from_c = torch.stack([g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g)], dim=1)
    from_h = tanh_c * o * (1 - o)
    h_to_c = o * (1 - tanh_c * tanh_c)
    grad_gates = grad_TH.new_empty(n_steps, 4, width)
    grad_c, grad_h = torch.zeros_like(grad_TH[0]), grad_TH[-1]
    for t in reversed(range(n_steps)):
        grad_c = torch.addcmul(grad_c, grad_h, h_to_c[t])
        torch.mul(from_c[t], grad_c, out=grad_gates[t, :3])
        torch.mul(from_h[t], grad_h, out=grad_gates[t, 3])
        grad_c = grad_c * f[t]
        if t:
            grad_h = torch.addmv(grad_TH[t - 1], weight_hh.t(), grad_gates[t].flatten())
    return grad_gates.flatten(1)


_BACK = Kernel(
    "back",
    """
  T *restrict cells = malloc((2 * steps + 3) * H * sizeof(T)), *restrict tanh_c = cells + (steps + 1) * H;
  T *restrict grad_c = tanh_c + steps * H, *restrict grad_h = grad_c + H;
  for (long j = 0; j < H; j++) cells[j] = cell[j], grad_c[j] = grad_h[j] = 0;
  for (long t = 0; t < steps; t++) {
    const T *restrict at = gates + t * 4 * H;
    for (long j = 0; j < H; j++)
      cells[(t + 1) * H + j] = at[H + j] * cells[t * H + j] + at[j] * at[2 * H + j];
    for (long j = 0; j < H; j++) tanh_c[t * H + j] = TANH(cells[(t + 1) * H + j]);
  }
  for (long t = steps - 1; t >= 0; t--) {
    T *restrict at = gates + t * 4 * H;
    for (long j = 0; j < H; j++) {
      const T i = at[j], f = at[H + j], g = at[2 * H + j], o = at[3 * H + j], u = tanh_c[t * H + j];
      const T h = grad_h[j] + grad[t * H + j], c = grad_c[j] + h * o * (1 - u * u);
      at[j] = c * g * i * (1 - i);
      at[H + j] = c * cells[t * H + j] * f * (1 - f);
      at[2 * H + j] = c * i * (1 - g * g);
      at[3 * H + j] = h * u * o * (1 - o);
      grad_c[j] = c * f;
      grad_h[j] = 0;
    }
    for (long k = 0; k < 4 * H && t; k += 4) {  /* 4 H is a multiple of 4 */
      const T a = at[k], b = at[k + 1], c = at[k + 2], d = at[k + 3];
      const T *restrict w = weight + k * H;
      for (long j = 0; j < H; j++) grad_h[j] += a * w[j] + b * w[H + j] + c * w[2 * H + j] + d * w[3 * H + j];
    }
  }
  free(cells);""",
    (
        *map(Long, ("steps", "H")),
        Array("grad", "steps, H"),
        Array("cell", "1, H"),
        Array("weight", "4 * H, H"),
        Array("gates", "steps, 4 * H", out=True),
    ),
    head="#define TANH(x) _Generic((x), float: tanhf, double: tanh)(x)",
)


def _run_back_in_c(grad_TH: Tensor, gates: Tensor, c0: Tensor, weight_hh: Tensor) -> Tensor:
    """Return the same, in the memory of the gates and without a call into torch at every step."""
    (n_steps, width), n = grad_TH.shape, 2 * grad_TH.shape[1]
    gates[:, :n].sigmoid_()
    gates[:, n : n + width].tanh_()
    gates[:, n + width :].sigmoid_()
    _BACK({"steps": n_steps, "H": width, "grad": grad_TH, "cell": c0, "weight": weight_hh, "gates": gates})
    return gates


def _run(
    x_TD: Tensor, h0: Tensor, c0: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    output, (h, c) = _torch_lstm(x_TD[None], (h0, c0), weight_ih, weight_hh, bias)
    return output[0], h, c


class _OneStream(torch.autograd.Function):
    """One stream (T, D) whose initial state (1, H) and final state carry no gradient (truncated backpropagation)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = _run(*inputs)
        _save(ctx, inputs, outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_ih, grad_hh, grad_bias = _gradients(grad_TH, *ctx.saved_tensors)
        return grad_x, None, None, grad_ih, grad_hh, grad_bias


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], *inputs)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(grad_TH: Tensor, output_TH: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x, both weights and the bias; ``inputs`` are those of ``_run``."""
    x_TD, h0, c0, weight_ih, weight_hh, bias = inputs
    before_TH = torch.cat([h0, output_TH[:-1]])
    gates = torch.addmm(bias, x_TD, weight_ih.t()).addmm_(before_TH, weight_hh.t())
    run_back = _run_back_in_c if _BACK.serves(grad_TH) else _run_back
    grad_gates = run_back(grad_TH, gates, c0, weight_hh)
    by_time = grad_gates.t()
    return grad_gates @ weight_ih, by_time @ x_TD, by_time @ before_TH, grad_gates.sum(0)


# torch.compile sees one operation each way, of which it knows the shapes; without it they cost more than _OneStream
_SCHEMA = "Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor bias"
_run_as_op = torch.library.custom_op(
    "dynlm::lstm", _run, mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor)"
)
_gradients_as_op = torch.library.custom_op(
    "dynlm::lstm_backward",
    _gradients,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor output, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _shapes(x_TD: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape[0], h0.shape[1]), torch.empty_like(h0), torch.empty_like(c0)


def _gradient_shapes(grad: Tensor, output: Tensor, x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (x, *weights)]


def _back(ctx: Any, grad_TH: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_ih, grad_hh, grad_bias = _gradients_as_op(grad_TH, *ctx.saved_tensors)
    return grad_x, None, None, grad_ih, grad_hh, grad_bias


_run_as_op.register_fake(_shapes)
_gradients_as_op.register_fake(_gradient_shapes)
_run_as_op.register_autograd(_back, setup_context=_save)
