"""The gated learned rule (COPY, UPDATE, FLUSH; Wolf et al. 2018, arXiv:1803.10631), started at a tuned RMS rule.

    θ_{t+1} = f ⊙ θ_t − i ⊙ d_t + (1 − f) ⊙ θ0

d is the gradient over its static RMS plus learned shares of two of its running means; i, f and the shares come from a
small network that all weights share. Its last layer starts at zero, and there the rule *is* the RMS rule it was given:
learning can only move away from it where that pays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynlm.optim.base import Clock, Coordinates, Observation, Prior, Slots
from dynlm.optim.features import N_COL, N_ROW, affine, softsign
from dynlm.optim.learned import CellConfig, GatingNetwork, frame, power, pull

N_FEATURES = 8 + N_ROW + N_COL
N_OUTPUTS = 4  # log2 of UPDATE's multiplier, two momentum shares, shift of FLUSH


@dataclass(frozen=True)
class GatedConfig(CellConfig):
    """The gated cell."""

    hidden: int = 8
    """units of the shared network"""
    betas: tuple[float, float] = (0.7, 0.95)
    """start of the two running means' decays, per segment; learned"""


class Gated(GatingNetwork):
    """See the module's docstring. A few hundred meta-parameters, two state floats a weight."""

    name = "gated"
    n_slots = 2
    config: GatedConfig
    config_class = GatedConfig

    def __init__(self, config: GatedConfig | None = None, seed: int = 0) -> None:
        config = config or GatedConfig()
        super().__init__(config)
        self.logit_betas = nn.Parameter(torch.tensor([math.log(b / (1 - b)) for b in config.betas]))
        self.log2_scales = nn.Parameter(torch.zeros(4))  # of the inputs that are squashed
        self.add_network(N_FEATURES, config.hidden, N_OUTPUTS, seed)

    def context(self, prior: Prior, observation: Observation, clock: Clock) -> Slots:
        """(network weights and settings at this tensor and time); the parts that carry φ into ``step``."""
        settings = self.rms_settings(prior)
        typical = settings.new_tensor([prior.mean_rms])
        numbers = torch.cat([settings, self.logit_betas.sigmoid(), self.log2_scales.exp2(), typical])
        return (*self.network(prior, observation), numbers.to(prior.theta0.dtype))

    def step(self, w: Coordinates, slots: Slots, context: Slots, expand: bool = False) -> tuple[Tensor, Slots]:
        input_weight, hidden_bias, output_weight, output_bias, numbers = context
        lr, eps, decay, beta1, beta2, s0, s1, s2, s3, typical = numbers.unbind()
        f = frame(w, eps, typical)
        m1 = beta1 * slots[0] + (1 - beta1) * f.normalised
        m2 = beta2 * slots[1] + (1 - beta2) * f.normalised
        g, a, b = softsign(s0 * f.normalised), softsign(2 * s1 * m1), softsign(6 * s2 * m2)
        moved = s3 * f.delta
        moved = moved / (4 * lr * f.share + moved.abs())  # softsign of δ in units of four typical updates
        features = [g, a, b, moved, g * moved, b * moved, g.abs(), w.rms / f.floor, *w.row, *w.col]
        hidden = [h.abs() for h in affine(features, input_weight, hidden_bias, expand)]
        update, share1, share2, flush = affine(hidden, output_weight, output_bias, expand)
        direction = power(update) * f.direction + f.share * (share1 * m1 + share2 * m2)
        return w.theta - lr * direction - pull(w, decay, flush) * f.delta, (m1, m2)
