"""The gated learned rule (COPY, UPDATE, FLUSH; Wolf et al. 2018, arXiv:1803.10631), started at a tuned RMS rule.

    θ_{t+1} = f ⊙ θ_t − i ⊙ d_t + (1 − f) ⊙ θ0

d is the gradient over its static RMS plus learned shares of two of its running means; i, f and the shares come from a
small network that all weights share. Its last layer starts at zero, and there the rule *is* the RMS rule it was given:
learning can only move away from it where that pays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynlm.optim.base import Clock, Coordinates, Observation, Prior, Rule, Slots
from dynlm.optim.features import N_COL, N_ROW, N_SCALARS, affine, observe_matrix, softsign

N_FEATURES = 8 + N_ROW + N_COL
N_OUTPUTS = 4  # log2 of UPDATE's multiplier, two momentum shares, shift of FLUSH
FLUSH_RANGE = 0.05  # one unit of output moves FLUSH by this much per segment


@dataclass(frozen=True)
class GatedConfig:
    """The gated cell. ``lr``, ``eps`` and ``decay`` are the RMS rule it starts at."""

    lr: float = 2e-3
    eps: float = 5e-4
    decay: float = 1e-3
    hidden: int = 8
    """units of the shared network"""
    betas: tuple[float, float] = (0.7, 0.95)
    """start of the two running means' decays, per segment; learned"""
    tensors: tuple[str, ...] = ()
    """names of the tensors that get a learned embedding; others use the shared network alone"""


class Gated(Rule):
    """See the module's docstring. A few hundred meta-parameters, two state floats a weight."""

    name = "gated"
    n_slots = 2

    def __init__(self, config: GatedConfig | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config = config = config or GatedConfig()
        generator = torch.Generator().manual_seed(seed)
        n_tensors, hidden = len(config.tensors), config.hidden
        self.tensor_index = {name: i for i, name in enumerate(config.tensors)}

        def normal(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float32) * std)

        self.log2_lr = nn.Parameter(torch.zeros(()))  # multipliers of the tuned settings, exactly 1 at the start
        self.log2_eps = nn.Parameter(torch.zeros(()))
        self.log2_decay = nn.Parameter(torch.zeros(()))
        self.logit_betas = nn.Parameter(torch.tensor([math.log(b / (1 - b)) for b in config.betas]))
        self.log2_scales = nn.Parameter(torch.zeros(4))  # of the inputs that are squashed
        self.input_weight = normal(hidden, N_FEATURES, std=N_FEATURES**-0.5)
        self.input_scalars = normal(hidden, N_SCALARS, std=0.3)
        self.input_tensors = normal(n_tensors, hidden, std=0.3)
        self.output_weight = nn.Parameter(torch.zeros(N_OUTPUTS, hidden))
        self.output_scalars = nn.Parameter(torch.zeros(N_OUTPUTS, N_SCALARS))
        self.output_tensors = nn.Parameter(torch.zeros(n_tensors, N_OUTPUTS))

    @classmethod
    def from_rms(cls, settings: dict[str, float], priors: Sequence[Prior], hidden: int = 8, seed: int = 0) -> Gated:
        """The gated rule that starts exactly at a tuned RMS rule, for a model with these tensors."""
        lr, eps, decay = (settings[name] for name in ("lr", "eps", "decay"))
        return cls(GatedConfig(lr, eps, decay, hidden, tensors=tuple(p.name for p in priors)), seed)

    def observe(self, grad: Tensor, prior: Prior, memory: Any, clock: Clock) -> tuple[Observation, Any]:
        return observe_matrix(grad, prior, memory, clock)

    def context(self, prior: Prior, observation: Observation, clock: Clock) -> Slots:
        """(network weights and settings at this tensor and time); the parts that carry φ into ``step``."""
        assert observation.scalars is not None
        scalars, dtype, config = observation.scalars, prior.theta0.dtype, self.config
        hidden_bias = self.input_scalars.to(dtype) @ scalars
        output_bias = self.output_scalars.to(dtype) @ scalars
        index = self.tensor_index.get(prior.name)
        if index is not None:
            hidden_bias = hidden_bias + self.input_tensors[index]
            output_bias = output_bias + self.output_tensors[index]
        multipliers = torch.stack([self.log2_lr, self.log2_eps, self.log2_decay]).exp2()
        settings = multipliers * multipliers.new_tensor([config.lr, config.eps, config.decay * prior.relative_rms])
        typical = settings.new_tensor([prior.mean_rms])  # guards divisions where a weight's own RMS is near zero
        numbers = torch.cat([settings, self.logit_betas.sigmoid(), self.log2_scales.exp2(), typical])
        return (self.input_weight.to(dtype), hidden_bias, self.output_weight.to(dtype), output_bias, numbers.to(dtype))

    def step(self, w: Coordinates, slots: Slots, context: Slots, expand: bool = False) -> tuple[Tensor, Slots]:
        input_weight, hidden_bias, output_weight, output_bias, numbers = context
        lr, eps, decay, beta1, beta2, s0, s1, s2, s3, typical = numbers.unbind()
        delta = w.theta - w.theta0
        floor = w.rms + 0.1 * typical
        normalised = w.grad / floor
        inverse = 1 / (w.rms + eps)
        direction = w.grad * inverse
        share = floor * inverse  # |direction| of a typical gradient
        m1 = beta1 * slots[0] + (1 - beta1) * normalised
        m2 = beta2 * slots[1] + (1 - beta2) * normalised
        g, a, b = softsign(s0 * normalised), softsign(2 * s1 * m1), softsign(6 * s2 * m2)
        moved = s3 * delta
        moved = moved / (4 * lr * share + moved.abs())  # softsign of δ in units of four typical updates
        features = [g, a, b, moved, g * moved, b * moved, g.abs(), w.rms / floor, *w.row, *w.col]
        hidden = [h.abs() for h in affine(features, input_weight, hidden_bias, expand)]
        update, share1, share2, flush = affine(hidden, output_weight, output_bias, expand)
        direction = _power(update) * direction + share * (share1 * m1 + share2 * m2)
        pull = ((decay * w.rms).clamp(max=1.0) + FLUSH_RANGE * flush).clamp(0.0, 1.0)
        return w.theta - lr * direction - pull * delta, (m1, m2)

    def settings(self) -> dict[str, float]:
        with torch.no_grad():
            return {
                "lr": float(self.config.lr * self.log2_lr.exp2()),
                "eps": float(self.config.eps * self.log2_eps.exp2()),
                "decay": float(self.config.decay * self.log2_decay.exp2()),
                "meta_parameters": float(sum(p.numel() for p in self.parameters())),
            }


def _power(x: Tensor) -> Tensor:
    """About 2^x for |x| < 3 and exactly 1 at 0: (1 + x ln 2 / 8)^8, three products instead of a transcendental."""
    y = (1 + (math.log(2) / 8) * x).clamp(0.0, 2.0)
    y = y * y
    y = y * y
    return y * y
