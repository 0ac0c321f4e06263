"""Learned cells with a recurrent network in each weight: LSTM (2 × 20; Andrychowicz et al. 2016, arXiv:1606.04474), GRU

    θ_{t+1} = θ_t − RMS rule's update − unit × o(h_t)

The gradient enters as LogAndSign, and a typical update of the RMS rule is the unit; the read-out o starts at zero. With
``lr`` 0 and ``scale`` 0.01 this is the published form, which starts where nothing moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from dynlm.kernels import Kernel
from dynlm.optim.base import N_TRAITS, Coordinates, Shared, Slots
from dynlm.optim.features import N_COL, N_ROW, N_SCALARS
from dynlm.optim.learned import CellConfig, Frame, Learned, Weights, assemble, frame, moved
from dynlm.optim.recurrent_kernel import recurrent_kernel
from dynlm.settings import Bound, NotNegative, Size

LOG_RANGE = 5.0  # k of LogAndSign: sizes between e^−k and 1 are seen as logarithms
N_INPUTS = 3 + N_ROW + N_COL


@dataclass(frozen=True)
class RecurrentConfig(CellConfig):
    """A stack of recurrent layers in each weight."""

    hidden: Size = 20
    """units of a layer"""
    layers: Annotated[int, Bound(1, 64)] = 2
    scale: NotNegative = 0.0
    """one unit of read-out, in typical gradients over RMS + ε; 0 takes ``lr``"""


class Recurrent(Learned):
    """What the LSTM and the GRU share: inputs, stack and read-out. State: one or two vectors (H) a layer and weight."""

    config: RecurrentConfig
    config_class = RecurrentConfig
    traceable = False  # thousands of products a weight: they need registers of their own, not one scalar loop
    name: Literal["lstm", "gru"]
    n_gates: int
    states_per_layer: int

    def __init__(self, config: RecurrentConfig | None = None, seed: int = 0) -> None:
        config = config or RecurrentConfig()
        super().__init__(config)
        width, gates = config.hidden, self.n_gates * config.hidden
        self.slot_width, self.n_slots = width, self.states_per_layer * config.layers
        normal = Weights(seed).normal
        self.log2_scale = nn.Parameter(torch.zeros(()))
        sizes = [N_INPUTS, *[width] * (config.layers - 1)]
        self.input_weights = nn.ParameterList(normal(gates, n, std=n**-0.5) for n in sizes)
        self.hidden_weights = nn.ParameterList(normal(gates, width, std=width**-0.5) for _ in sizes)
        self.biases = nn.ParameterList(self.initial_bias(width) for _ in sizes)
        self.input_scalars = normal(gates, N_SCALARS, std=0.3)
        self.input_traits = normal(gates, N_TRAITS, std=0.3)
        self.output_weight = nn.Parameter(torch.zeros(width))
        layers = zip(self.input_weights, self.hidden_weights, self.biases, strict=True)
        self.context_shapes = (*(tuple(t.shape) for three in layers for t in three), (width,), (5,))

    def initial_bias(self, width: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(self.n_gates * width))

    def layer(self, gates_x: Tensor, hidden_weight: Tensor, state: Slots) -> Slots:
        """New states of one layer (…, H), the output first, from W x + b (…, gates × H)."""
        raise NotImplementedError

    def context(self, shared: Shared) -> Tensor:
        like = shared.scalars
        first = self.biases[0].to(like) + shared.traits @ self.input_traits.to(like).t()
        first = first + like @ self.input_scalars.to(like).t()
        scale = self.log2_scale.expand(len(shared.mean_rms), 1).exp2() * (self.config.scale or self.config.lr)
        layers = [t for three in zip(self.input_weights, self.hidden_weights, self.biases, strict=True) for t in three]
        numbers = torch.cat([self.rms_settings(shared), scale.to(like), shared.mean_rms[:, None]], 1)
        return assemble(shared, layers[:2], first, [*layers[3:], self.output_weight], numbers)

    def step_kernel(self, n_row: int, n_col: int) -> Kernel:
        return recurrent_kernel(self.name, self.config.hidden, self.config.layers, n_row, n_col)

    def step(self, w: Coordinates, slots: Slots, context: Slots) -> tuple[Tensor, Slots]:
        *layers, output_weight, numbers = context
        lr, eps, decay, scale, typical = numbers.unbind()
        f = frame(w, eps, typical)
        unit = scale * f.share
        inputs = [*log_and_sign(f), moved(f, unit), *w.row, *w.col]
        x = torch.stack(torch.broadcast_tensors(*inputs), dim=-1)
        states: list[Tensor] = []
        for k in range(self.config.layers):
            input_weight, hidden_weight, bias = layers[3 * k : 3 * k + 3]
            before = slots[self.states_per_layer * k : self.states_per_layer * (k + 1)]
            after = self.layer(torch.nn.functional.linear(x, input_weight, bias), hidden_weight, before)
            states.extend(after)
            x = after[0]
        pull = (decay * w.rms).clamp(max=1.0)
        return w.theta - lr * f.direction - unit * (x @ output_weight) - pull * f.delta, tuple(states)


class LSTMCell(Recurrent):
    """Two states a layer: output h and cell c. Forget gates start open (bias 1)."""

    name = "lstm"
    n_gates, states_per_layer = 4, 2

    def initial_bias(self, width: int) -> nn.Parameter:
        bias = super().initial_bias(width)
        with torch.no_grad():
            bias[width : 2 * width] = 1.0
        return bias

    def layer(self, gates_x: Tensor, hidden_weight: Tensor, state: Slots) -> Slots:
        h, c = state
        i, keep, g, o = (gates_x + h @ hidden_weight.t()).chunk(4, dim=-1)
        c = keep.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class GRUCell(Recurrent):
    """One state a layer (Cho et al. 2014, arXiv:1406.1078)."""

    name = "gru"
    n_gates, states_per_layer = 3, 1

    def layer(self, gates_x: Tensor, hidden_weight: Tensor, state: Slots) -> Slots:
        (h,) = state
        rx, zx, nx = gates_x.chunk(3, dim=-1)
        rh, zh, nh = (h @ hidden_weight.t()).chunk(3, dim=-1)
        z = (zx + zh).sigmoid()
        return (z * h + (1 - z) * (nx + (rx + rh).sigmoid() * nh).tanh(),)


def log_and_sign(f: Frame) -> tuple[Tensor, Tensor]:
    """Return (size, sign) of the gradient, both in [−1, 1]: max(log|n|/k, −1) clipped above, and n e^k clipped."""
    tiny = torch.finfo(f.normalised.dtype).tiny
    size = (f.normalised.abs() + tiny).log() / LOG_RANGE
    return size.clamp(-1.0, 1.0), (f.normalised * torch.e**LOG_RANGE).clamp(-1.0, 1.0)
