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
from dynlm.optim.features import N_COL, N_ROW, affine, softsign
from dynlm.optim.learned import CellConfig, GatingNetwork, frame, moved, power, pull


@dataclass(frozen=True)
class DiagonalConfig(CellConfig):
    """The diagonal recurrence."""

    hidden: int = 8
    """units of the shared network"""
    decays: tuple[float, ...] = (0.5, 0.8, 0.95, 0.9)
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
        self.add_network(4 + n + N_ROW + N_COL, config.hidden, 2 + n, seed)

    def context(self, prior: Prior, observation: Observation, clock: Clock) -> Slots:
        settings = self.rms_settings(prior)
        numbers = torch.cat([settings, self.log2_scale.exp2()[None], settings.new_tensor([prior.mean_rms])])
        recurrence = torch.cat([self.logit_decays.sigmoid()[:, None], self.input_gain], 1)
        dtype = prior.theta0.dtype
        return (*self.network(prior, observation), recurrence.to(dtype), numbers.to(dtype))

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
        return w.theta - lr * direction - pull(w, decay, flush) * f.delta, tuple(states)
