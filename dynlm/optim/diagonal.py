"""A learned cell with a diagonal linear recurrence: n running means a weight, each with its own decay and input.

    s_k ← a_k s_k + (1 − a_k) (b_k1 n + b_k2 |n|),    n: the squashed gradient

A small network reads the states and gates the update as in dynlm.optim.gated. The recurrence is linear and elementwise
(Gu et al. 2022, arXiv:2206.11893, call such a state space model diagonal), so it is cheap and has a long memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynlm.optim.base import Clock, Coordinates, Observation, Prior, Slots
from dynlm.optim.features import N_COL, N_ROW, N_SCALARS, affine, softsign
from dynlm.optim.gated import FLUSH_RANGE
from dynlm.optim.learned import CellConfig, Learned, Weights, frame, moved, power


@dataclass(frozen=True)
class DiagonalConfig(CellConfig):
    """The diagonal recurrence."""

    hidden: int = 8
    """units of the shared network"""
    decays: tuple[float, ...] = (0.5, 0.8, 0.95, 0.9)
    """start of each state's decay, per segment; learned. The last state starts on |n|, the others on n"""


class Diagonal(Learned):
    """See the module's docstring. As many state floats a weight as there are decays."""

    name = "diagonal"
    config: DiagonalConfig
    config_class = DiagonalConfig

    def __init__(self, config: DiagonalConfig | None = None, seed: int = 0) -> None:
        config = config or DiagonalConfig()
        super().__init__(config)
        self.n_slots = n = len(config.decays)
        n_tensors, hidden, n_features = len(config.tensors), config.hidden, 4 + n + N_ROW + N_COL
        normal = Weights(seed).normal
        self.logit_decays = nn.Parameter(torch.tensor([math.log(a / (1 - a)) for a in config.decays]))
        self.input_gain = nn.Parameter(torch.tensor([[1.0, 0.0]] * (n - 1) + [[0.0, 1.0]]))
        self.log2_scale = nn.Parameter(torch.zeros(()))
        self.input_weight = normal(hidden, n_features, std=n_features**-0.5)
        self.input_scalars = normal(hidden, N_SCALARS, std=0.3)
        self.input_tensors = normal(n_tensors, hidden, std=0.3)
        self.output_weight = nn.Parameter(torch.zeros(2 + n, hidden))
        self.output_scalars = nn.Parameter(torch.zeros(2 + n, N_SCALARS))
        self.output_tensors = nn.Parameter(torch.zeros(n_tensors, 2 + n))

    def context(self, prior: Prior, observation: Observation, clock: Clock) -> Slots:
        assert observation.scalars is not None
        scalars, dtype = observation.scalars, prior.theta0.dtype
        hidden_bias = self.input_scalars.to(dtype) @ scalars + self.embedded(self.input_tensors, prior)
        output_bias = self.output_scalars.to(dtype) @ scalars + self.embedded(self.output_tensors, prior)
        settings = self.rms_settings(prior)
        numbers = torch.cat([settings, self.log2_scale.exp2()[None], settings.new_tensor([prior.mean_rms])])
        recurrence = torch.cat([self.logit_decays.sigmoid()[:, None], self.input_gain], 1)
        network = (self.input_weight, hidden_bias, self.output_weight, output_bias)
        return tuple(t.to(dtype) for t in (*network, recurrence, numbers))

    def step(self, w: Coordinates, slots: Slots, context: Slots, expand: bool = False) -> tuple[Tensor, Slots]:
        input_weight, hidden_bias, output_weight, output_bias, recurrence, numbers = context
        lr, eps, decay, scale, typical = numbers.unbind()
        f = frame(w, eps, typical)
        n = softsign(scale * f.normalised)
        states = []
        for state, row in zip(slots, recurrence.unbind(), strict=True):
            keep, of_sign, of_size = row.unbind()
            states.append(keep * state + (1 - keep) * (of_sign * n + of_size * n.abs()))
        delta = moved(f, lr * f.share)
        features = [n, n.abs(), delta, n * delta, *states, *w.row, *w.col]
        hidden = [h.abs() for h in affine(features, input_weight, hidden_bias, expand)]
        update, flush, *shares = affine(hidden, output_weight, output_bias, expand)
        momentum = shares[0] * states[0]
        for share, state in zip(shares[1:], states[1:], strict=True):
            momentum = momentum + share * state
        direction = power(update) * f.direction + f.share * momentum
        pull = ((decay * w.rms).clamp(max=1.0) + FLUSH_RANGE * flush).clamp(0.0, 1.0)
        return w.theta - lr * direction - pull * f.delta, tuple(states)
