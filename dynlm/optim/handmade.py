"""Hand-made online rules. Their settings are 0-dimensional meta-parameters, so the engines can differentiate them too.

With prior θ0, gradient g and static RMS r (R = r over its mean over tensors):
    static   θ ← θ
    sgd      θ ← θ − η g + λ (θ0 − θ)
    rms      θ ← θ − η g / (r + ε) + min(λ R, 1) (θ0 − θ)            Krause et al. 2017, arXiv:1709.07432
    adam     θ ← θ − η m̂ / (√v̂ + ε) + λ (θ0 − θ)                     Kingma & Ba 2014, arXiv:1412.6980
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynlm.optim.base import Coordinates, Rule, Shared, Slots, columns
from dynlm.settings import NotNegative, Share, check, hints_of

TINY = 1e-36
"""below this a mean square counts as zero: far below ε², within float32"""


def scalar(value: float) -> nn.Parameter:
    """A setting as a 0-dimensional meta-parameter in double precision: 0.1 stays 0.1 whatever the model's dtype."""
    return nn.Parameter(torch.tensor(float(value), dtype=torch.float64))


class Static(Rule):
    """The trained weights, never changed: the baseline of every gain."""

    name = "static"
    kind = "baseline"
    reads_gradient = False

    def step(self, w: Coordinates, slots: Slots, context: Slots) -> tuple[Tensor, Slots]:
        return w.theta, slots


class HandMade(Rule):
    """A rule whose settings are numbers with bounds: the types of its constructor's arguments say which."""

    def require_bounds(self, where: str) -> None:
        """Refuse settings that are not finite, or out of their bounds."""
        hints = hints_of(type(self).__init__)
        for name, value in self.settings().items():
            check(hints[name], value, f"{where}: {self.name} {name}")


class SGD(HandMade):
    """Gradient descent with decay to the prior: θ ← θ − η g + λ (θ0 − θ).

    Args:
        lr: η, a step for each nat of mean segment loss and unit of weight.
        decay: λ, the share of θ − θ0 that a segment takes away.

    Raises:
        InputError: a setting that is negative or not finite.
    """

    name = "sgd"
    context_shapes = ((), ())

    def __init__(self, lr: NotNegative = 1.0, decay: NotNegative = 0.0) -> None:
        super().__init__()
        self.lr, self.decay = scalar(lr), scalar(decay)
        self.require_bounds("rule")

    @property
    def uses_prior(self) -> bool:
        return bool(self.decay != 0)

    def context(self, shared: Shared) -> Tensor:
        return columns(shared, self.lr, self.decay)

    def step(self, w: Coordinates, slots: Slots, context: Slots) -> tuple[Tensor, Slots]:
        lr, decay = context
        return w.theta - lr * w.grad + decay * (w.theta0 - w.theta), slots


class RMS(HandMade):
    """Dynamic evaluation with a static RMS r (Krause et al. 2017): θ ← θ − η g / (r + ε) + min(λ R, 1) (θ0 − θ).

    R is r over its mean over tensors, and clipped so that decay never overshoots θ0.

    Args:
        lr: η, how far a weight moves at a gradient of its usual size.
        eps: ε, in units of the gradient.
        decay: λ, the share of θ − θ0 that a segment takes away from a weight of typical r.

    Raises:
        InputError: a setting that is negative or not finite.
    """

    name = "rms"
    context_shapes = ((), (), ())

    def __init__(self, lr: NotNegative = 2e-3, eps: NotNegative = 5e-4, decay: NotNegative = 1e-3) -> None:
        super().__init__()
        self.lr, self.eps, self.decay = scalar(lr), scalar(eps), scalar(decay)
        self.require_bounds("rule")

    def context(self, shared: Shared) -> Tensor:
        return columns(shared, self.lr, self.eps, self.decay * shared.relative_rms.double())

    def step(self, w: Coordinates, slots: Slots, context: Slots) -> tuple[Tensor, Slots]:
        lr, eps, decay = context
        pull = (decay * w.rms).clamp(max=1.0)
        return w.theta - lr * (w.grad / (w.rms + eps)) + pull * (w.theta0 - w.theta), slots


class Adam(HandMade):
    """Adam with decay to the prior; moments start at zero in each article and are bias-corrected.

    Args:
        lr: η, about how far a weight moves in a segment.
        eps: ε, in units of the gradient.
        decay: λ, the share of θ − θ0 that a segment takes away.
        beta1: decay of the first moment, a segment, below 1.
        beta2: of the second.

    Raises:
        InputError: a setting that is out of its bounds.
    """

    name = "adam"
    n_slots = 2
    context_shapes = ((),) * 6

    def __init__(
        self,
        lr: NotNegative = 1e-3,
        eps: NotNegative = 1e-8,
        decay: NotNegative = 0.0,
        beta1: Share = 0.9,
        beta2: Share = 0.999,
    ) -> None:
        super().__init__()
        self.lr, self.eps, self.decay = scalar(lr), scalar(eps), scalar(decay)
        self.beta1, self.beta2 = scalar(beta1), scalar(beta2)
        self.require_bounds("rule")

    @property
    def uses_prior(self) -> bool:
        return bool(self.decay != 0)

    def context(self, shared: Shared) -> Tensor:
        lr = self.lr / (1 - self.beta1**shared.step)
        correction2 = (1 - self.beta2**shared.step).sqrt()
        return columns(shared, lr, self.eps, self.decay, self.beta1, self.beta2, correction2)

    def step(self, w: Coordinates, slots: Slots, context: Slots) -> tuple[Tensor, Slots]:
        lr, eps, decay, beta1, beta2, correction2 = context
        m = beta1 * slots[0] + (1 - beta1) * w.grad
        v = beta2 * slots[1] + (1 - beta2) * w.grad.square()
        root = v.clamp(min=TINY).sqrt()  # √0 has no derivative: one weight without gradient would make ∇φ NaN
        direction = m / (root / correction2 + eps)
        return w.theta - lr * direction + decay * (w.theta0 - w.theta), (m, v)
