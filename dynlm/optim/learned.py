"""What learned cells share: they start at a tuned RMS rule, and see weights and gradients in the same units.

A cell's output layer starts at zero, and there the rule *is* the RMS rule it was given: learning can only move away
from it where that pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from dynlm.optim.base import N_TRAITS, Coordinates, Prior, Rule, RuleState, Seen, Shared, Slots
from dynlm.optim.features import N_COL, N_ROW, N_SCALARS, affine, look
from dynlm.settings import NotNegative, Settings

FLUSH_RANGE = 0.05  # one unit of output moves FLUSH by this much per segment


@dataclass(frozen=True)
class CellConfig(Settings):
    """The RMS rule that a cell starts at."""

    lr: NotNegative = 2e-3
    eps: NotNegative = 5e-4
    decay: NotNegative = 1e-3


class Learned(Rule):
    """A rule with a configuration, an RMS rule as its start, and statistics of rows, columns and tensors as inputs."""

    kind = "learned"
    config: CellConfig
    config_class: ClassVar[type[CellConfig]]

    def __init__(self, config: CellConfig) -> None:
        super().__init__()
        self.config = config
        self.log2_lr = nn.Parameter(torch.zeros(()))  # multipliers of the tuned settings, exactly 1 at the start
        self.log2_eps = nn.Parameter(torch.zeros(()))
        self.log2_decay = nn.Parameter(torch.zeros(()))

    holds_gates = False
    """the network's outputs count as constants: what is left of the step is linear, and its slopes are the gates"""

    def gate(self, output: Tensor) -> Tensor:
        """Return an output of the cell's network, on its way into the step."""
        return output.detach() if self.holds_gates else output

    @classmethod
    def started_at(cls, settings: dict[str, float], priors: Sequence[Prior], seed: int = 0, **sizes: Any) -> Self:
        """Return the rule that starts exactly at a tuned RMS rule, for a model with these tensors."""
        config: Any = cls.config_class
        build: Any = cls
        rule: Self = build(config(**_of_rms(settings), **sizes), seed)
        return rule

    def restarted_at(self, settings: dict[str, float]) -> Self:
        """Return the same φ over another RMS rule, such as another model's: what was learned moves away from it."""
        kind: Any = type(self)
        rule: Self = kind(replace(self.config, **_of_rms(settings)))
        rule.load_state_dict(self.state_dict())
        return rule

    def observe(
        self, thetas: Sequence[Tensor], grads: Sequence[Tensor], state: RuleState, priors: Sequence[Prior]
    ) -> tuple[Seen, Any]:
        return look(grads, priors, state.memory, state.clock)

    def rms_settings(self, shared: Shared) -> Tensor:
        """Return (n, 3): lr, eps, decay of each tensor as they are now."""
        like, config = shared.mean_rms, self.config
        multipliers = torch.stack([self.log2_lr, self.log2_eps, self.log2_decay]).exp2().to(like)
        settings = multipliers * multipliers.new_tensor([config.lr, config.eps, config.decay])
        return torch.stack([torch.ones_like(like), torch.ones_like(like), shared.relative_rms], 1) * settings

    def settings(self) -> dict[str, float]:
        with torch.no_grad():
            return {
                "lr": float(self.config.lr * self.log2_lr.exp2()),
                "eps": float(self.config.eps * self.log2_eps.exp2()),
                "decay": float(self.config.decay * self.log2_decay.exp2()),
                "meta_parameters": float(sum(p.numel() for p in self.parameters())),
            }


def assemble(shared: Shared, *parts: Sequence[Tensor] | Tensor) -> Tensor:
    """A context (…, n, N): lists of what is the same for all tensors and segments, and (…, n, k) or (n, k) of each."""
    shape, like = shared.scalars.shape[:-1], shared.scalars
    flat = [t if isinstance(t, Tensor) else torch.cat([x.reshape(-1) for x in t]) for t in parts]
    return torch.cat([t.to(like).expand(*shape, t.shape[-1]) for t in flat], -1)


def _of_rms(settings: dict[str, float]) -> dict[str, float]:
    """Return the settings of a tuned RMS rule that a cell's configuration holds."""
    return {name: settings[name] for name in ("lr", "eps", "decay")}


class GatingNetwork(Learned):
    """A learned cell whose gates come from two hidden layers side by side: one a weight, and one a row.

    The row's is evaluated once a row, so it costs nothing: of an embedding, a row is a word. Both are shifted by the
    tensor's kind and statistics.
    """

    def add_network(self, n_features: int, hidden: int, n_outputs: int, seed: int) -> None:
        """Its weights: random inputs, a read-out at zero. ``hidden`` units a weight, and twice as many a row."""
        normal, row_hidden = Weights(seed).normal, 2 * hidden
        self.input_weight = normal(hidden, n_features + N_COL, std=n_features**-0.5)
        self.row_weight = normal(row_hidden, N_ROW, std=N_ROW**-0.5)
        self.row_to_hidden = normal(hidden, row_hidden, std=row_hidden**-0.5)
        self.input_scalars = normal(hidden + row_hidden, N_SCALARS, std=0.3)
        self.input_traits = normal(hidden + row_hidden, N_TRAITS, std=0.3)
        self.output_weight = nn.Parameter(torch.zeros(n_outputs, hidden))
        self.row_to_output = nn.Parameter(torch.zeros(n_outputs, row_hidden))
        self.output_scalars = nn.Parameter(torch.zeros(n_outputs, N_SCALARS))
        self.output_traits = nn.Parameter(torch.zeros(n_outputs, N_TRAITS))
        fixed = (self.input_weight, self.row_weight, self.row_to_hidden, self.output_weight, self.row_to_output)
        self.network_shapes = (*(tuple(t.shape) for t in fixed), (hidden,), (row_hidden,), (n_outputs,))

    def network(self, shared: Shared) -> tuple[list[Tensor], Tensor]:
        """Return (weights, biases) in the order of ``network_shapes``."""
        fixed: list[Tensor] = [
            self.input_weight,
            self.row_weight,
            self.row_to_hidden,
            self.output_weight,
            self.row_to_output,
        ]
        known = torch.cat([shared.scalars, shared.traits.expand(*shared.scalars.shape[:-1], N_TRAITS)], -1)
        into = known @ torch.cat([self.input_scalars, self.input_traits], 1).to(known).t()
        out = known @ torch.cat([self.output_scalars, self.output_traits], 1).to(known).t()
        return fixed, torch.cat([into, out], -1)

    def gates(self, features: Sequence[Tensor], w: Coordinates, network: Slots) -> list[Tensor]:
        """Return the outputs of the network, each (R, C) or (K,)."""
        input_weight, row_weight, row_to_hidden, output_weight, row_to_output, bias, row_bias, output_bias = network
        of_row = [h.abs() for h in affine(w.row, row_weight, row_bias)]
        hidden_bias = affine(of_row, row_to_hidden, bias)
        hidden = [h.abs() for h in affine([*features, *w.col], input_weight, hidden_bias)]
        outputs = affine(hidden, output_weight, affine(of_row, row_to_output, output_bias))
        return [self.gate(x) for x in outputs]


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
