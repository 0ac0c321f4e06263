"""The smallest learned cell: θ_{t+1} = θ_t + w g_t + b, two weights that all coordinates share.

It starts at zero, where nothing moves, or at SGD with w = −lr. b is in units of the tensor's mean static RMS, so that
the same rate trains both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from dynlm.optim.base import Coordinates, Prior, Rule, Shared, Slots, columns
from dynlm.optim.handmade import scalar
from dynlm.settings import Finite, Settings


@dataclass(frozen=True)
class LinearConfig(Settings):
    """Where the two weights start."""

    weight: Finite = 0.0
    bias: Finite = 0.0


class Linear(Rule):
    """See the module's docstring."""

    name = "linear"
    kind = "learned"
    context_shapes = ((), ())
    config_class = LinearConfig

    def __init__(self, config: LinearConfig | None = None) -> None:
        super().__init__()
        self.config = config or LinearConfig()
        self.weight, self.bias = scalar(self.config.weight), scalar(self.config.bias)

    @classmethod
    def started_at(cls, settings: dict[str, float], priors: Sequence[Prior], seed: int = 0) -> Self:
        """Return the rule that starts at tuned SGD (without its decay, which this cell has not)."""
        return cls(LinearConfig(weight=-settings["lr"]))

    def context(self, shared: Shared) -> Tensor:
        return columns(shared, self.weight, self.bias * shared.mean_rms.double())

    def step(self, w: Coordinates, slots: Slots, context: Slots) -> tuple[Tensor, Slots]:
        weight, bias = context
        return w.theta + weight * w.grad + bias, slots
