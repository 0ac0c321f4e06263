"""The gated learned rule (COPY, UPDATE, FLUSH; Wolf et al. 2018, arXiv:1803.10631), started at a tuned RMS rule.

    θ_{t+1} = f ⊙ θ_t − i ⊙ d_t + (1 − f) ⊙ θ0

d is the gradient over its static RMS plus learned shares of two of its running means; i, f and the shares come from a
small network that all weights share. Its last layer starts at zero, and there the rule *is* the RMS rule it was given:
learning can only move away from it where that pays. The network is as small as it can be, as each of its products is
done for every weight at every segment; what can be known of a whole row or tensor is worked out there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynlm.optim.base import Coordinates, Shared, Slots
from dynlm.optim.features import softsign
from dynlm.optim.learned import CellConfig, GatingNetwork, assemble, frame, moved, power, pull
from dynlm.settings import Decay, Size

N_FEATURES = 5
N_OUTPUTS = 4  # log2 of UPDATE's multiplier, two momentum shares, shift of FLUSH


@dataclass(frozen=True)
class GatedConfig(CellConfig):
    """The gated cell: the rms rule that it starts at, and its sizes."""

    hidden: Size = 4
    """units of the shared network"""
    betas: tuple[Decay, Decay] = (0.7, 0.95)
    """start of the two running means' decays, per segment; learned"""


class Gated(GatingNetwork):
    """COPY, UPDATE and FLUSH from a small network that all weights share: a few hundred meta-parameters φ in all.

    Two state numbers a weight. :func:`dynlm.meta_train` makes one from a tuned rms rule; a fresh one is that of its
    configuration, with ``seed`` for the first layer of its network, whose last layer is zero.
    """

    name = "gated"
    n_slots = 2
    config: GatedConfig
    config_class = GatedConfig

    def __init__(self, config: GatedConfig | None = None, seed: int = 0) -> None:
        config = config or GatedConfig()
        super().__init__(config)
        self.logit_betas = nn.Parameter(torch.tensor([math.log(b / (1 - b)) for b in config.betas]))
        self.log2_scales = nn.Parameter(torch.zeros(3))  # of the inputs that are squashed
        self.add_network(N_FEATURES, config.hidden, N_OUTPUTS, seed)
        self.context_shapes = (*self.network_shapes[:5], (5,), *self.network_shapes[5:], (4,))

    def context(self, shared: Shared) -> Tensor:
        """Network weights and settings at these tensors and times: the parts that carry φ into ``step``."""
        weights, biases = self.network(shared)
        inputs = [self.logit_betas.sigmoid(), self.log2_scales.exp2()]
        return assemble(shared, [*weights, *inputs], biases, self.rms_settings(shared), shared.mean_rms[:, None])

    def step(self, w: Coordinates, slots: Slots, context: Slots) -> tuple[Tensor, Slots]:
        *weights, inputs, bias, row_bias, output_bias, numbers = context
        beta1, beta2, s0, s1, s2 = inputs.unbind()
        lr, eps, decay, typical = numbers.unbind()
        f = frame(w, eps, typical)
        m1 = slots[0] + (1 - beta1) * (f.normalised - slots[0])
        m2 = slots[1] + (1 - beta2) * (f.normalised - slots[1])
        g, a, b = softsign(s0 * f.normalised), softsign(2 * s1 * m1), softsign(6 * s2 * m2)
        features = [g, a, b, moved(f, lr * f.share), g.abs()]
        network = (*weights, bias, row_bias, output_bias)
        update, share1, share2, flush = self.gates(features, w, network)
        direction = power(update) * f.direction + f.share * (share1 * m1 + share2 * m2)
        return w.theta - lr * direction - pull(w, decay, flush) * f.delta, (m1, m2)
