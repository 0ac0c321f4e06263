"""A learned cell with a diagonal linear recurrence: n running means a weight, each with its own decay and input.

    s_k ← a_k s_k + (1 − a_k) (b_k1 n + b_k2 |n|),    n: the squashed gradient

A small network reads the states and gates the update as in dynlm.optim.gated. The recurrence is linear and elementwise
(Gu et al. 2022, arXiv:2206.11893, call such a state space model diagonal), so it is cheap and has a long memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from dynlm.optim.base import Coordinates, Shared, Slots
from dynlm.optim.features import softsign
from dynlm.optim.learned import CellConfig, GatingNetwork, assemble, frame, moved, power, pull
from dynlm.settings import Decay, NotEmpty, Size


@dataclass(frozen=True)
class DiagonalConfig(CellConfig):
    """The diagonal recurrence."""

    hidden: Size = 4
    """units of the shared network"""
    decays: Annotated[tuple[Decay, ...], NotEmpty()] = (0.5, 0.8, 0.95, 0.9)
    """start of each state's decay, per segment; learned. The last state starts on |n|, the others on n"""


class Diagonal(GatingNetwork):
    """See the module's docstring. As many state floats a weight as there are decays."""

    name = "diagonal"
    config: DiagonalConfig
    config_class = DiagonalConfig

    def __init__(self, config: DiagonalConfig | None = None, seed: int = 0) -> None:
        config = config or DiagonalConfig()
        super().__init__(config)
        self.n_slots = n = len(config.decays)
        self.logit_decays = nn.Parameter(torch.tensor([math.log(a / (1 - a)) for a in config.decays]))
        self.input_gain = nn.Parameter(torch.tensor([[1.0, 0.0]] * (n - 1) + [[0.0, 1.0]]))
        self.log2_scale = nn.Parameter(torch.zeros(()))
        self.add_network(4 + n, config.hidden, 2 + n, seed)
        self.context_shapes = (*self.network_shapes[:5], (n, 3), (), *self.network_shapes[5:], (4,))

    def context(self, shared: Shared) -> Tensor:
        weights, biases = self.network(shared)
        recurrence = torch.cat([self.logit_decays.sigmoid()[:, None], self.input_gain], 1)
        fixed = [*weights, recurrence, self.log2_scale.exp2()]
        return assemble(shared, fixed, biases, self.rms_settings(shared), shared.mean_rms[:, None])

    def step(self, w: Coordinates, slots: Slots, context: Slots) -> tuple[Tensor, Slots]:
        *weights, recurrence, scale, bias, row_bias, output_bias, numbers = context
        lr, eps, decay, typical = numbers.unbind()
        f = frame(w, eps, typical)
        n = softsign(scale * f.normalised)
        states = []
        for state, row in zip(slots, recurrence.unbind(), strict=True):
            keep, of_sign, of_size = row.unbind()
            states.append(keep * state + (1 - keep) * (of_sign * n + of_size * n.abs()))
        delta = moved(f, lr * f.share)
        features = [n, n.abs(), delta, n * delta, *states]
        network = (*weights, bias, row_bias, output_bias)
        update, flush, *shares = self.gates(features, w, network)
        momentum = shares[0] * states[0]
        for share, state in zip(shares[1:], states[1:], strict=True):
            momentum = momentum + share * state
        direction = power(update) * f.direction + f.share * momentum
        return w.theta - lr * direction - pull(w, decay, flush) * f.delta, tuple(states)
