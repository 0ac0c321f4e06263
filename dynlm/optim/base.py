"""The contract of an online rule U_φ, and the bookkeeping that every rule shares.

A rule is an ``nn.Module`` whose parameters are its meta-parameters φ. Its work splits in three, and the split is what
makes meta-gradients cheap (dynlm.meta.replay) and the update one pass over memory (dynlm.optim.kernel):

1. ``observe``: statistics of whole tensors. No φ enters, so nothing is differentiated.
2. ``context``: a few numbers a tensor and segment, from φ and the statistics, for all tensors at once and for as many
   segments as are given; a hierarchical rule has a network with a memory here (``tensor_step``). θ does not enter.
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
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dynlm.kernels import Column, Kernel
from dynlm.optim import sharing

Slots = tuple[Tensor, ...]


class KeptSlots(list[Slots]):
    """``slots[tensor][slot]`` of tensors that stay the same from step to step, and so do their columns."""

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        return tuple(map(Column, zip(*self, strict=True)))


def columns_of(slots: Sequence[Slots]) -> tuple[Sequence[Tensor], ...]:
    """Return each slot, or feature, of all tensors."""
    return slots.columns if isinstance(slots, KeptSlots) else tuple(zip(*slots, strict=True))


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


N_TRAITS = 4


def traits_of(prior: Prior) -> tuple[float, float, float, float]:
    """What kind of tensor it is: logarithms of its rows, columns and share in the gradient, and whether it is a vector.

    All are about 1 in size and the same for a model in other units, so that a rule can read models it was not made for.
    """
    rows, columns = prior.theta0.shape
    share = softened(0.25 * math.log2(max(prior.mean_rms * prior.relative_rms, 1e-30)))
    return math.log2(rows) / 8 - 1, math.log2(columns) / 8 - 1, share, float(rows == 1)


def softened(x: float) -> float:
    """x / (1 + |x|): a squash to (−1, 1)."""
    return x / (1 + abs(x))


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


StepFunction = Callable[[Coordinates, Slots, Tensor], tuple[Tensor, Slots]]
"""as ``Rule.step``, with the context as one vector"""


class Seen(NamedTuple):
    """What ``observe`` saw in n tensors at one segment: no graph, no φ."""

    rows: tuple[Slots, ...]
    """row features of each tensor, each (R, 1)"""
    cols: tuple[Slots, ...]
    """column features of each tensor, each (1, C)"""
    scalars: Tensor
    """(n, S)"""


class Shared(NamedTuple):
    """What ``context`` reads, of n tensors side by side and at any number of segments (…)."""

    traits: Tensor
    """(n, N_TRAITS) what kind of tensor it is, whatever its name: see :func:`traits_of`"""
    mean_rms: Tensor
    """(n,)"""
    relative_rms: Tensor
    """(n,)"""
    scalars: Tensor
    """(…, n, S)"""
    step: Tensor
    """(…, 1) segments read so far, double precision"""


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
    """The rule's memory: ``slots[tensor][slot]`` is (R, C) or (R, C, H); ``memory`` belongs to ``observe``, ``tensors``
    (n, M) to ``tensor_step``."""

    slots: list[Slots]
    memory: Any
    tensors: Tensor
    clock: Clock = field(default_factory=Clock)


class Rule(nn.Module, abc.ABC):
    """Base of all rules. Subclasses give ``step``; ``observe`` and ``context`` where they need them."""

    name: str
    kind: ClassVar[Literal["baseline", "hand-made", "learned"]] = "hand-made"
    """baseline: never changes the weights; hand-made: a formula whose settings are tuned; learned: a meta-trained
    network. Results carry it and the report reads it."""
    made: dict[str, Any] = {}  # noqa: RUF012 (replaced, never changed)
    """how the rule was found, of one that was loaded from a file"""
    config: Any = None
    """the dataclass that the rule is made from; hand-made rules have none"""
    config_class: ClassVar[Any] = None
    """its type"""
    n_slots: int = 0
    slot_width: int = 0
    """0: a slot is one number a weight; H: a vector (R, C, H)"""
    tensor_width: int = 0
    """numbers a tensor that ``tensor_step`` remembers; 0: the context has no memory"""
    context_shapes: tuple[tuple[int, ...], ...] = ()
    """of the tensors that ``step`` gets as its context, which ``context`` gives as one vector"""
    reads_gradient: bool = True
    traceable: bool = True
    """``step`` is short and uses only what dynlm.optim.trace knows, so it can become one fused loop"""

    @property
    def uses_prior(self) -> bool:
        """Whether ``step`` needs θ0 or the static RMS: an optimizer keeps them only then."""
        return True

    @property
    def reference_lr(self) -> float:
        """The ``lr`` at which a :class:`LearnedOptimizer` makes this rule's own step: the rule's rate, or 1 without."""
        rate = getattr(self, "lr", None)
        value = float(rate.detach()) if isinstance(rate, Tensor) else float(getattr(self.config, "lr", 1.0))
        return value if value > 0 else 1.0

    def save_pretrained(self, folder: str | Path, license: str = "apache-2.0") -> Path:
        """Write the rule and a model card into a folder (:mod:`dynlm.optim.sharing`); returns the rule's file."""
        return sharing.save_pretrained(self, folder, license=license)

    def push_to_hub(self, repo_id: str, license: str = "apache-2.0") -> str:
        """Upload the rule as ``user/repo`` (:mod:`dynlm.optim.sharing`); returns the address of the commit."""
        return sharing.push_to_hub(self, repo_id, license=license)

    def init(self, priors: Sequence[Prior]) -> RuleState:
        """Return the state at θ0, one entry for each prior: all zeros."""
        width = (self.slot_width,) if self.slot_width else ()
        slots = [tuple(p.theta0.new_zeros(p.theta0.shape + width) for _ in range(self.n_slots)) for p in priors]
        return RuleState(slots, None, priors[0].theta0.new_zeros(len(priors), self.tensor_width))

    def observe(
        self, thetas: Sequence[Tensor], grads: Sequence[Tensor], state: RuleState, priors: Sequence[Prior]
    ) -> tuple[Seen, Any]:
        """Statistics of all tensors (R, C) before the update, and ``state.memory`` for the next segment.

        Default: none.
        """
        return Seen(((),) * len(grads), ((),) * len(grads), grads[0].new_empty(len(grads), 0)), state.memory

    def split_memory(self, memory: Any, n: int) -> list[Slots]:
        """Return what ``observe`` remembers, as plain tensors of each of the n tensors.

        Fits None, an (n, …) tensor, and a list with a (named) tuple of tensors for each.
        """
        if memory is None:
            return [()] * n
        return [(m,) if isinstance(m, Tensor) else tuple(m) for m in memory]

    def join_memory(self, parts: Sequence[Slots], like: Any) -> Any:
        """Return the inverse of ``split_memory``; ``like`` is a memory of any tensors, for its kind."""
        if not parts[0]:
            return None
        if isinstance(like, Tensor):
            return torch.stack([m for (m,) in parts])
        make = getattr(like[0], "_make", type(like[0]))  # as named tuples want it
        return [make(part) for part in parts]

    def shared(self, priors: Sequence[Prior], scalars: Tensor, steps: Sequence[int]) -> Shared:
        """Return what the context reads; with (W, n, S) statistics and W steps, or with (n, S) and one."""
        step = torch.tensor(steps, dtype=torch.float64, device=scalars.device)
        numbers = scalars.new_tensor([[p.mean_rms, p.relative_rms] for p in priors])
        traits = scalars.new_tensor([traits_of(p) for p in priors])
        mean_rms, relative_rms = numbers.unbind(1)
        return Shared(traits, mean_rms, relative_rms, scalars, step[:, None] if scalars.dim() == 3 else step)

    def context(self, shared: Shared) -> Tensor:
        """(…, n, N) numbers that the coordinates of a tensor share at a segment: the only way in for φ. Default: none.

        N is what ``context_shapes`` hold together.
        """
        return shared.scalars[..., :0]

    def tensor_step(self, shared: Shared, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return (context, new memory) of one segment: for rules whose context has a memory (n, M) of its own."""
        return self.context(shared), memory

    def split(self, context_N: Tensor) -> Slots:
        """Return the context of one tensor in the shapes that ``step`` takes."""
        parts = context_N.split([math.prod(shape) for shape in self.context_shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, self.context_shapes, strict=True))

    @abc.abstractmethod
    def step(self, w: Coordinates, slots: Slots, context: Slots) -> tuple[Tensor, Slots]:
        """New weights and slots, elementwise, from the arguments alone (no φ of its own): + − × ÷, abs, sqrt, clamp.

        ``dynlm.optim.features.affine`` is a matrix product that dynlm.optim.trace can turn into C.
        """

    def step_kernel(self, n_row: int, n_col: int) -> Kernel | None:
        """One tensor's step in C (dynlm.optim.recurrent_kernel), for rules that are not traceable. Default: none."""
        return None

    def flat_step(self, w: Coordinates, slots: Slots, context_N: Tensor) -> tuple[Tensor, Slots]:
        """``step``, with the context as one vector."""
        return self.step(w, slots, self.split(context_N.to(w.theta.dtype)))

    def settings(self) -> dict[str, float]:
        """Return the hyperparameters by name, for reports."""
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
        with torch.no_grad():
            seen, memory = self.observe(thetas, grads, state, priors)
        shared = self.shared(priors, seen.scalars, [state.clock.step])
        context_nN, tensors = self.tensor_step(shared, state.tensors)
        new = RuleState([], memory, tensors, state.clock)
        new_thetas = []
        for i, (theta, grad, prior) in enumerate(zip(thetas, grads, priors, strict=True)):
            w = Coordinates(theta, prior.theta0, prior.rms, grad, seen.rows[i], seen.cols[i])
            theta, slots = (step or self.flat_step)(w, state.slots[i], context_nN[i].to(theta.dtype))
            new_thetas.append(theta)
            new.slots.append(slots)
        return new_thetas, new


def columns(shared: Shared, *numbers: Tensor) -> Tensor:
    """Return a context without networks: (…, n, k), double precision, from k numbers of n tensors.

    Each number is (…, n), (…, 1) or one for all.
    """
    shape = shared.scalars.shape[:-1]
    return torch.stack([x.to(torch.float64).expand(shape) for x in numbers], -1)
