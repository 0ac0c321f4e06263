"""The contract of an online rule U_φ, and the bookkeeping that every rule shares.

A rule is an ``nn.Module`` whose parameters are its meta-parameters φ. Its work splits in three, and the split is what
makes meta-gradients cheap (dynlm.meta.replay):

1. ``observe``: statistics of a whole gradient tensor. No φ enters, so nothing is differentiated.
2. ``context``: a few numbers a tensor and segment, from φ and the observations; a hierarchical rule has a network with
   its own memory here (``tensor_step``). It does not see θ.
3. ``step``: elementwise over coordinates and differentiable in the context. Given that, coordinates do not see each
   other, so any sample of them can be replayed alone.

Each tensor is a matrix (R, C); a vector is one row. ``step`` must broadcast, as it is called with (R, C) matrices while
reading and with (K,) samples while meta-training.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Slots = tuple[Tensor, ...]


class Prior(NamedTuple):
    """What is known of one tensor before reading: fixed for the life of a model."""

    name: str
    theta0: Tensor
    """trained weights (R, C)"""
    rms: Tensor
    """static RMS of the segment gradient on training text (R, C), Krause et al. 2017, arXiv:1709.07432"""
    mean_rms: float
    """mean of ``rms``: the typical size of this tensor's gradients"""
    relative_rms: float
    """1 / mean over tensors of mean(rms): scales ``rms`` into Krause's R"""


class Coordinates(NamedTuple):
    """The weights that ``step`` updates: (R, C) matrices of one tensor, or (K,) samples of it."""

    theta: Tensor
    theta0: Tensor
    rms: Tensor
    grad: Tensor
    row: Slots
    """observed row features, each (R, 1) or gathered to (K,)"""
    col: Slots
    """observed column features, each (1, C) or gathered to (K,)"""


StepFunction = Callable[[Coordinates, Slots, Slots], tuple[Tensor, Slots]]


class Observation(NamedTuple):
    """What ``observe`` saw in one gradient tensor: no graph, no φ."""

    row: Slots = ()
    col: Slots = ()
    scalars: Tensor | None = None


@dataclass
class Clock:
    """Time and surprise, common to all tensors. ``loss`` is the segment's mean nats, ``baseline`` its running mean."""

    step: int = 0
    loss: float = math.nan
    baseline: float = math.nan

    def tick(self, loss: float, decay: float = 0.9) -> None:
        """Take note of a segment's loss, before the update that follows it."""
        first = self.step == 0
        self.baseline = loss if first else decay * self.baseline + (1 - decay) * self.loss
        self.loss = loss
        self.step += 1


@dataclass
class RuleState:
    """The rule's memory.

    ``slots[tensor][slot]`` is (R, C) or (R, C, H), ``tensors[tensor]`` belongs to ``tensor_step``, ``memory[tensor]``
    to ``observe``.
    """

    slots: list[Slots]
    memory: list[Any]
    tensors: list[Slots]
    clock: Clock = field(default_factory=Clock)


class Rule(nn.Module, abc.ABC):
    """Base of all rules. Subclasses give ``step``; ``observe`` and ``context`` where they need them."""

    name: str
    n_slots: int = 0
    slot_width: int = 0
    """0: a slot is one number a weight; H: a vector (R, C, H)"""
    reads_gradient: bool = True
    traceable: bool = True
    """``step`` is short and uses only what dynlm.optim.trace knows, so it can become one fused loop"""

    def init(self, priors: Sequence[Prior]) -> RuleState:
        """The state at θ0: all zeros."""
        width = (self.slot_width,) if self.slot_width else ()
        slots = [tuple(p.theta0.new_zeros(p.theta0.shape + width) for _ in range(self.n_slots)) for p in priors]
        return RuleState(slots=slots, memory=[None] * len(priors), tensors=[self.tensor_init(p) for p in priors])

    def tensor_init(self, prior: Prior) -> Slots:
        """The start of the memory that :meth:`tensor_step` keeps for a tensor. Default: none."""
        return ()

    def observe(self, grad: Tensor, prior: Prior, memory: Any, clock: Clock) -> tuple[Observation, Any]:
        """Statistics of the gradient (R, C) of one tensor, and the memory for the next segment. Default: none."""
        return Observation(), memory

    def context(self, prior: Prior, observation: Observation, clock: Clock) -> Slots:
        """Small tensors that all coordinates of a tensor share at this step: the only way in for φ. Default: none."""
        return ()

    def tensor_step(self, prior: Prior, observation: Observation, clock: Clock, memory: Slots) -> tuple[Slots, Slots]:
        """(context, new memory): for rules whose context has a memory of its own. Default: ``context``, no memory."""
        return self.context(prior, observation, clock), memory

    @abc.abstractmethod
    def step(self, w: Coordinates, slots: Slots, context: Slots, expand: bool = False) -> tuple[Tensor, Slots]:
        """New weights and slots, elementwise, from the arguments alone (no φ of its own): + − × ÷, abs, sqrt, clamp.

        ``expand`` asks for scalar code instead of matrix products: dynlm.optim.trace turns it into C.
        """

    def settings(self) -> dict[str, float]:
        """Hyperparameters by name, for reports."""
        return {name: float(p.detach()) for name, p in self.named_parameters() if p.numel() == 1}

    def update(
        self,
        thetas: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: RuleState,
        priors: Sequence[Prior],
        step: StepFunction | None = None,
    ) -> tuple[list[Tensor], RuleState]:
        """One functional update of all tensors: the plain reference, differentiable in φ, nothing changed in place.

        ``state.clock`` must already have ticked for this segment. ``step`` stands in for the rule's own.
        """
        new_thetas = []
        new = RuleState([], [], [], state.clock)
        for i, (theta, grad, prior) in enumerate(zip(thetas, grads, priors, strict=True)):
            with torch.no_grad():
                seen, memory = self.observe(grad, prior, state.memory[i], state.clock)
            context, of_tensor = self.tensor_step(prior, seen, state.clock, state.tensors[i])
            w = Coordinates(theta, prior.theta0, prior.rms, grad, seen.row, seen.col)
            theta, slots = (step or self.step)(w, state.slots[i], context)
            new_thetas.append(theta)
            new.slots.append(slots)
            new.memory.append(memory)
            new.tensors.append(of_tensor)
        return new_thetas, new
