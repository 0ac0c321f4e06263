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

from dynlm.optim.base import N_TRAITS, Coordinates, Shared, Slots
from dynlm.optim.features import N_COL, N_ROW, N_SCALARS, affine, softsign
from dynlm.optim.learned import CellConfig, Learned, Weights, assemble, frame, moved, power, pull
from dynlm.settings import Decay, Size

N_MEANS = 3
N_FEATURES = 5 + 2 * N_MEANS + N_ROW + N_COL
TINY = 1e-6  # under the root of the second moment: a weight that has seen no gradient divides by a thousandth


@dataclass(frozen=True)
class MLPConfig(CellConfig):
    """Sizes of both networks."""

    hidden: Size = 4
    """units of each of the two layers of the network a weight"""
    tensor_hidden: Size = 8
    """units of the recurrent network a tensor"""
    betas: tuple[Decay, Decay, Decay, Decay] = (0.5, 0.8, 0.95, 0.95)
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
        self.tensor_start = normal(top, N_TRAITS, std=0.3)
        self.tensor_output = normal(hidden, top, std=top**-0.5)
        self.tensor_settings = nn.Parameter(torch.zeros(4, top))  # log2 lr, FLUSH, direction, size
        self.tensor_width = top
        network = ((hidden, N_FEATURES), (hidden, hidden), (hidden,), (2, hidden))
        self.context_shapes = (*network, (N_MEANS + 1,), (hidden,), (8,))

    def tensor_step(self, shared: Shared, memory: Tensor) -> tuple[Tensor, Tensor]:
        dtype = memory.dtype
        before = memory + shared.traits @ self.tensor_start.to(dtype).t()  # what it is, is always in its memory
        rx, zx, nx = (shared.scalars @ self.tensor_input.to(dtype).t()).chunk(3, -1)
        rh, zh, nh = (before @ self.tensor_recurrent.to(dtype).t()).chunk(3, -1)
        z = (zx + zh).sigmoid()
        h = z * memory + (1 - z) * (nx + (rx + rh).sigmoid() * nh).tanh()
        fixed: list[Tensor] = [self.first_weight, self.second_weight, self.second_bias, self.output_weight]
        fixed.append(self.logit_betas.sigmoid())
        varying = [h @ self.tensor_output.to(dtype).t(), h @ self.tensor_settings.to(dtype).t()]
        return assemble(shared, fixed, *varying, self.rms_settings(shared), shared.mean_rms[:, None]), h

    def step(self, w: Coordinates, slots: Slots, context: Slots) -> tuple[Tensor, Slots]:
        first_weight, second_weight, second_bias, output_weight, betas, first_bias, numbers = context
        faster, flush, direction_bias, size_bias, lr, eps, decay, typical = numbers.unbind()
        beta, n_means = betas.unbind(), N_MEANS
        f = frame(w, eps, typical)
        n, unit = f.normalised, lr * f.share
        means = [b * m + (1 - b) * n for b, m in zip(beta[:n_means], slots[:n_means], strict=True)]
        second = beta[n_means] * slots[n_means] + (1 - beta[n_means]) * n * n
        inverse = 1 / (second + TINY).sqrt()
        squashed, delta = softsign(n), moved(f, unit)
        ratios = [softsign(m * inverse) for m in means]
        features = [squashed, squashed.abs(), softsign(n * inverse), delta, w.rms / f.floor]
        features += [*(softsign(2 * m) for m in means), *ratios, *w.row, *w.col]
        hidden = [leaky(h) for h in affine(features, first_weight, first_bias)]
        hidden = [leaky(h) for h in affine(hidden, second_weight, second_bias)]
        direction, size = map(self.gate, affine(hidden, output_weight, (direction_bias, size_bias)))
        step = power(faster) * f.direction + f.share * direction * power(size)
        return w.theta - lr * step - pull(w, decay, flush) * f.delta, (*means, second)


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU with slope 0.1: no unit dies, and a sign passes through."""
    return 0.55 * x + 0.45 * x.abs()
