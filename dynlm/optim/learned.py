"""What learned cells share: they start at a tuned RMS rule, and see weights and gradients in the same units.

A cell's output layer starts at zero, and there the rule *is* the RMS rule it was given: learning can only move away
from it where that pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from dynlm.optim.base import Clock, Coordinates, Observation, Prior, Rule, Slots
from dynlm.optim.features import N_SCALARS, observe_matrix

FLUSH_RANGE = 0.05  # one unit of output moves FLUSH by this much per segment


@dataclass(frozen=True)
class CellConfig:
    """The RMS rule that a cell starts at, and the tensors it knows by name."""

    lr: float = 2e-3
    eps: float = 5e-4
    decay: float = 1e-3
    tensors: tuple[str, ...] = ()
    """names of the tensors that get a learned embedding; others use the shared network alone"""


class Learned(Rule):
    """A rule with a configuration, an RMS rule as its start, and statistics of rows, columns and tensors as inputs."""

    config: CellConfig
    config_class: ClassVar[type[CellConfig]]
    start: ClassVar[str] = "rms"
    """the hand-made rule whose tuned settings :meth:`started_at` takes"""

    def __init__(self, config: CellConfig) -> None:
        super().__init__()
        self.config = config
        self.tensor_index = {name: i for i, name in enumerate(config.tensors)}
        self.log2_lr = nn.Parameter(torch.zeros(()))  # multipliers of the tuned settings, exactly 1 at the start
        self.log2_eps = nn.Parameter(torch.zeros(()))
        self.log2_decay = nn.Parameter(torch.zeros(()))

    @classmethod
    def started_at(cls, settings: dict[str, float], priors: Sequence[Prior], seed: int = 0, **sizes: Any) -> Self:
        """The rule that starts exactly at a tuned RMS rule, for a model with these tensors."""
        known = {name: settings[name] for name in ("lr", "eps", "decay")}
        config: Any = cls.config_class
        build: Any = cls
        rule: Self = build(config(**known, tensors=tuple(p.name for p in priors), **sizes), seed)
        return rule

    def observe(self, grad: Tensor, prior: Prior, memory: Any, clock: Clock) -> tuple[Observation, Any]:
        return observe_matrix(grad, prior, memory, clock)

    def rms_settings(self, prior: Prior) -> Tensor:
        """(lr, eps, decay for this tensor) as they are now."""
        multipliers = torch.stack([self.log2_lr, self.log2_eps, self.log2_decay]).exp2()
        config = self.config
        return multipliers * multipliers.new_tensor([config.lr, config.eps, config.decay * prior.relative_rms])

    def embedded(self, table: Tensor, prior: Prior) -> Tensor | float:
        """The tensor's row of an embedding table, or zero for a tensor that has none."""
        index = self.tensor_index.get(prior.name)
        return 0.0 if index is None else table[index]

    def settings(self) -> dict[str, float]:
        with torch.no_grad():
            return {
                "lr": float(self.config.lr * self.log2_lr.exp2()),
                "eps": float(self.config.eps * self.log2_eps.exp2()),
                "decay": float(self.config.decay * self.log2_decay.exp2()),
                "meta_parameters": float(sum(p.numel() for p in self.parameters())),
            }


class GatingNetwork(Learned):
    """A learned cell whose gates come from one hidden layer a weight, shifted by the tensor's name and statistics."""

    def add_network(self, n_features: int, hidden: int, n_outputs: int, seed: int) -> None:
        """Its weights: random inputs, a read-out at zero."""
        normal, n_tensors = Weights(seed).normal, len(self.config.tensors)
        self.input_weight = normal(hidden, n_features, std=n_features**-0.5)
        self.input_scalars = normal(hidden, N_SCALARS, std=0.3)
        self.input_tensors = normal(n_tensors, hidden, std=0.3)
        self.output_weight = nn.Parameter(torch.zeros(n_outputs, hidden))
        self.output_scalars = nn.Parameter(torch.zeros(n_outputs, N_SCALARS))
        self.output_tensors = nn.Parameter(torch.zeros(n_tensors, n_outputs))

    def network(self, prior: Prior, observation: Observation) -> Slots:
        """(hidden weight and bias, output weight and bias) for this tensor and segment."""
        assert observation.scalars is not None
        scalars, dtype = observation.scalars, prior.theta0.dtype
        hidden_bias = self.input_scalars.to(dtype) @ scalars + self.embedded(self.input_tensors, prior)
        output_bias = self.output_scalars.to(dtype) @ scalars + self.embedded(self.output_tensors, prior)
        return tuple(t.to(dtype) for t in (self.input_weight, hidden_bias, self.output_weight, output_bias))


class Frame(NamedTuple):
    """A coordinate in the units of its own gradient."""

    delta: Tensor
    """θ − θ0"""
    floor: Tensor
    """static RMS, kept from zero by a tenth of the tensor's mean"""
    normalised: Tensor
    """gradient / floor: about one for a typical gradient"""
    direction: Tensor
    """gradient / (RMS + ε): what the RMS rule subtracts, over its lr"""
    share: Tensor
    """|direction| of a typical gradient: lr × share is a typical update of the RMS rule"""


def frame(w: Coordinates, eps: Tensor, typical: Tensor) -> Frame:
    """``typical`` is the tensor's mean static RMS, which guards divisions where a weight's own is near zero."""
    floor = w.rms + 0.1 * typical
    inverse = 1 / (w.rms + eps)
    return Frame(w.theta - w.theta0, floor, w.grad / floor, w.grad * inverse, floor * inverse)


def moved(f: Frame, unit: Tensor) -> Tensor:
    """δ in units of four typical updates, squashed to (−1, 1); ``unit`` is a typical update."""
    return f.delta / (4 * unit + f.delta.abs())


class Weights:
    """Draws of initial weights from one seed, float32 whatever the default dtype."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=self.generator, dtype=torch.float32) * std)


def pull(w: Coordinates, decay: Tensor, flush: Tensor) -> Tensor:
    """FLUSH: the RMS rule's decay to θ0, moved by a cell's output, in [0, 1]."""
    return ((decay * w.rms).clamp(max=1.0) + FLUSH_RANGE * flush).clamp(0.0, 1.0)


def power(x: Tensor) -> Tensor:
    """About 2^x for |x| < 3 and exactly 1 at 0: (1 + x ln 2 / 8)^8, three products instead of a transcendental."""
    y = (1 + (0.6931471805599453 / 8) * x).clamp(0.0, 2.0)
    y = y * y
    y = y * y
    return y * y
