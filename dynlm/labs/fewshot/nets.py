"""Small networks for few-shot tasks, and what makes a network a scorer of the inner loop.

Both are the ones of MAML (Finn, Abbeel & Levine 2017, arXiv:1703.03400): an MLP 1-40-40-1 for the sinusoid, and four
blocks of 3×3 convolution (stride 2), normalisation and ReLU for characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Losses = Callable[[Tensor, Tensor], Tensor]


class MLP(nn.Sequential):
    """Fully connected layers with ReLU between them; ``sizes`` runs from the inputs to the outputs."""

    def __init__(self, sizes: Sequence[int] = (1, 40, 40, 1)) -> None:
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        super().__init__(*layers[:-1])


class StackedLinear(nn.Module):
    """As many linear maps side by side as ``layer`` is to be copied: inputs (N, B, in), outputs (N, B, out)."""

    def __init__(self, layer: nn.Linear, copies: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().expand(copies, -1, -1).clone())
        self.bias = nn.Parameter(layer.bias.detach().expand(copies, -1).clone())

    def forward(self, x_NBD: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[:, None], x_NBD, self.weight.transpose(1, 2))


def stacked(net: MLP, copies: int) -> nn.Sequential:
    """Copies of an MLP that run as one, parameter names unchanged: each copy learns a task of its own."""
    return nn.Sequential(*(StackedLinear(m, copies) if isinstance(m, nn.Linear) else m for m in net))


class StackedScorer:
    """The losses of stacked copies, (N · B,), scaled so that their mean is the sum of the copies' mean losses.

    Inputs and targets are (N, B, D). Each copy's gradient is that of its own task: one inner loop is N of them.
    """

    def __init__(self, net: nn.Module, losses: Losses) -> None:
        self.net, self.losses = net, losses

    def __call__(self, inputs_S: Tensor, targets_S: Tensor, hidden: Any) -> tuple[Tensor, None]:
        outputs_NBD = self.net(inputs_S)
        return len(inputs_S) * self.losses(outputs_NBD.flatten(0, 1), targets_S.flatten(0, 1)), None


class Normalise(nn.Module):
    """Mean 0 and variance 1, then a learned scale and shift a channel. No running statistics, so nothing but θ is kept.

    ``batch``: over batch and positions, so that an image's features depend on the images scored with it (transductive,
    as in MAML). ``image``: over all channels and positions of one image, each image alone.
    """

    def __init__(self, channels: int, kind: Literal["batch", "image"]) -> None:
        super().__init__()
        self.kind = kind
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.kind == "batch":
            return F.batch_norm(x_BCHW, None, None, self.weight, self.bias, training=True)
        return F.group_norm(x_BCHW, 1, self.weight, self.bias)


class ConvNet(nn.Module):
    """Images (B, 1, side, side) to class scores (B, ways)."""

    def __init__(
        self, ways: int = 5, width: int = 32, blocks: int = 4, normalise: Literal["batch", "image"] = "image"
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in in [1, *[width] * (blocks - 1)]:
            layers += [nn.Conv2d(n_in, width, 3, stride=2, padding=1), Normalise(width, normalise), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, ways)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(images_BCHW).mean((2, 3)))
        return scores


class NetScorer:
    """A network as a scorer: one loss an example, no hidden state."""

    def __init__(self, net: nn.Module, losses: Losses) -> None:
        self.net, self.losses = net, losses

    def __call__(self, inputs_S: Tensor, targets_S: Tensor, hidden: Any) -> tuple[Tensor, None]:
        return self.losses(self.net(inputs_S), targets_S), None


def squared_error(outputs_BD: Tensor, targets_BD: Tensor) -> Tensor:
    """Return (B,): mean over the outputs of the squared error."""
    return (outputs_BD - targets_BD).square().mean(1)


def cross_entropy(scores_BD: Tensor, labels_B: Tensor) -> Tensor:
    """Return (B,) in nats."""
    return F.cross_entropy(scores_BD, labels_B, reduction="none")


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a network whose random start depends on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
