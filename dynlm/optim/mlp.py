"""A hierarchical learned cell: a tiny MLP in each weight, and a recurrent network a tensor on top of it.

The MLP follows small_fc_lopt (Metz et al. 2022, arXiv:2203.11860): two layers of four units over running means of the
gradient, its second moment, ratios of both, rows and columns, with a direction and a size as outputs. The network on
top reads the tensor's statistics at every segment, remembers, and shifts the MLP's layers and settings; θ does not
enter it, so that it is replayed once, with the summed gradient of all coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynlm.optim.base import Clock, Coordinates, Observation, Prior, Slots
from dynlm.optim.features import N_COL, N_ROW, N_SCALARS, affine, softsign
from dynlm.optim.learned import CellConfig, Learned, Weights, frame, moved, power, pull

N_MEANS = 3
N_FEATURES = 5 + 2 * N_MEANS + N_ROW + N_COL
TINY = 1e-6  # under the root of the second moment: a weight that has seen no gradient divides by a thousandth


@dataclass(frozen=True)
class MLPConfig(CellConfig):
    """Sizes of both networks."""

    hidden: int = 4
    """units of each of the two layers of the network a weight"""
    tensor_hidden: int = 8
    """units of the recurrent network a tensor"""
    betas: tuple[float, ...] = (0.5, 0.8, 0.95, 0.95)
    """start of the decays of three running means and of the second moment, per segment; learned"""


class MLP(Learned):
    """See the module's docstring. Four state floats a weight."""

    name = "mlp"
    n_slots = N_MEANS + 1
    config: MLPConfig
    config_class = MLPConfig

    def __init__(self, config: MLPConfig | None = None, seed: int = 0) -> None:
        config = config or MLPConfig()
        super().__init__(config)
        hidden, top, normal = config.hidden, config.tensor_hidden, Weights(seed).normal
        self.logit_betas = nn.Parameter(torch.tensor([math.log(b / (1 - b)) for b in config.betas]))
        self.first_weight = normal(hidden, N_FEATURES, std=N_FEATURES**-0.5)
        self.second_weight = normal(hidden, hidden, std=hidden**-0.5)
        self.second_bias = nn.Parameter(torch.zeros(hidden))
        self.output_weight = nn.Parameter(torch.zeros(2, hidden))
        self.tensor_input = normal(3 * top, N_SCALARS, std=N_SCALARS**-0.5)
        self.tensor_recurrent = normal(3 * top, top, std=top**-0.5)
        self.tensor_start = normal(len(config.tensors), top, std=0.3)
        self.tensor_output = normal(hidden, top, std=top**-0.5)
        self.tensor_settings = nn.Parameter(torch.zeros(4, top))  # log2 lr, FLUSH, direction, size

    def tensor_init(self, prior: Prior) -> Slots:
        return (prior.theta0.new_zeros(self.config.tensor_hidden),)

    def tensor_step(self, prior: Prior, observation: Observation, clock: Clock, memory: Slots) -> tuple[Slots, Slots]:
        assert observation.scalars is not None
        dtype, (h,) = prior.theta0.dtype, memory
        seen = observation.scalars + h.new_zeros(N_SCALARS)
        before = h + self.embedded(self.tensor_start.to(dtype), prior)  # the tensor's name is always in its memory
        rx, zx, nx = (self.tensor_input.to(dtype) @ seen).chunk(3)
        rh, zh, nh = (self.tensor_recurrent.to(dtype) @ before).chunk(3)
        z = (zx + zh).sigmoid()
        h = z * h + (1 - z) * (nx + (rx + rh).sigmoid() * nh).tanh()
        of_tensor = self.tensor_settings.to(dtype) @ h
        settings = self.rms_settings(prior).to(dtype)
        typical = settings.new_tensor([prior.mean_rms])
        numbers = torch.cat([settings, typical, of_tensor[:2], self.logit_betas.sigmoid().to(dtype)])
        weights = (self.first_weight, self.tensor_output.to(dtype) @ h, self.second_weight, self.second_bias)
        return tuple(t.to(dtype) for t in (*weights, self.output_weight, of_tensor[2:], numbers)), (h,)

    def step(self, w: Coordinates, slots: Slots, context: Slots, expand: bool = False) -> tuple[Tensor, Slots]:
        first_weight, first_bias, second_weight, second_bias, output_weight, output_bias, numbers = context
        lr, eps, decay, typical, faster, flush, *betas = numbers.unbind()
        f = frame(w, eps, typical)
        n, unit = f.normalised, lr * f.share
        means = [b * m + (1 - b) * n for b, m in zip(betas[:N_MEANS], slots[:N_MEANS], strict=True)]
        second = betas[N_MEANS] * slots[N_MEANS] + (1 - betas[N_MEANS]) * n * n
        inverse = 1 / (second + TINY).sqrt()
        squashed, delta = softsign(n), moved(f, unit)
        ratios = [softsign(m * inverse) for m in means]
        features = [squashed, squashed.abs(), softsign(n * inverse), delta, w.rms / f.floor]
        features += [*(softsign(2 * m) for m in means), *ratios, *w.row, *w.col]
        hidden = [leaky(h) for h in affine(features, first_weight, first_bias, expand)]
        hidden = [leaky(h) for h in affine(hidden, second_weight, second_bias, expand)]
        direction, size = affine(hidden, output_weight, output_bias, expand)
        step = power(faster) * f.direction + f.share * direction * power(size)
        return w.theta - lr * step - pull(w, decay, flush) * f.delta, (*means, second)


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU with slope 0.1: no unit dies, and a sign passes through."""
    return 0.55 * x + 0.45 * x.abs()
