"""Parameters that an optimizer updates in one call, laid out as rules want them, and kept from step to step.

To lay out thousands of small tensors takes longer than to update them, and between two steps little changes but their
gradients.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlm.kernels import Column
from dynlm.models.params import as_matrix
from dynlm.optim.base import Clock, KeptSlots, Prior, Rule, RuleState
from dynlm.optim.kernel import InPlaceUpdate, Scale

State = dict[str, Any]
"""of one parameter: its number of steps, and tensors by name"""


class Member(NamedTuple):
    """A parameter, its name, the number of its group and its state."""

    parameter: Tensor
    name: str
    group: int
    state: State


class Bundle:
    """Parameters of one device, computing dtype and age. ``like`` is a memory of the rule, for its kind.

    What a rule changes of a parameter's state lies in that state, and here is seen as matrices (R, C).
    """

    def __init__(self, rule: Rule, members: Sequence[Member], like: Any) -> None:
        self.rule, self.members = rule, members
        self.parameters = [m.parameter for m in members]
        self.states = [m.state for m in members]
        self.dtype = computing(self.parameters[0])
        self.thetas = Column(_matrix(p.detach(), self.dtype) for p in self.parameters)
        self.copied = [i for i, p in enumerate(self.parameters) if self.thetas[i].data_ptr() != p.data_ptr()]
        width = (rule.slot_width,) * (rule.slot_width > 0)
        shapes = [theta.shape + width for theta in self.thetas]
        names = [f"slot{k}" for k in range(rule.n_slots)]
        self.slots = KeptSlots(
            tuple(s[name].view(shape) for name in names) for s, shape in zip(self.states, shapes, strict=True)
        )
        self.known = [Prior(m.name, t, t, 1.0, 1.0) for m, t in zip(members, self.thetas, strict=True)]
        if rule.uses_prior:
            rows = zip(self.known, self.states, strict=True)
            self.known = [p._replace(theta0=as_matrix(s["theta0"]), rms=as_matrix(s["rms"])) for p, s in rows]
        parts = [tuple(s[key] for key in sorted(s) if key.startswith("memory")) for s in self.states]
        self.memory = rule.join_memory(parts, like)
        blank = self.thetas[0].new_empty(0)
        self.tensors = torch.stack([s["tensor"] for s in self.states] if rule.tensor_width else [blank] * len(members))
        self.lies = self._places()
        self.seen = [[*s.values()] for s in self.states]
        self.shown: Any = None  # the memory whose parts the states hold

    @property
    def device(self) -> torch.device:
        return self.thetas[0].device

    @property
    def age(self) -> int:
        """Steps that its parameters have made."""
        age: int = self.states[0]["step"]
        return age

    def holds(self, state: dict[Tensor, State]) -> bool:
        """Return whether the parameters lie where they lay, and their states in the optimizer's are untouched."""
        return (
            all(state.get(p) is s for p, s in zip(self.parameters, self.states, strict=True))
            and all(map(_same, self.states, self.seen))
            and self._places() == self.lies
        )

    def _places(self) -> list[Any]:
        """Return where weights and slots lie; whoever moves them may keep the tensors."""
        slots = [s[f"slot{k}"].data_ptr() for s in self.states for k in range(self.rule.n_slots)]
        return [*[(p.data_ptr(), p.dtype, p.shape, p.is_contiguous()) for p in self.parameters], *slots]

    def gradients(self, maximize: Sequence[bool]) -> Column:
        """(R, C) in the computing dtype; negative in a group that climbs."""
        grads = [_matrix(p.grad, self.dtype) for p in self.parameters if p.grad is not None]
        if any(maximize):
            grads = [-grad if maximize[m.group] else grad for grad, m in zip(grads, self.members, strict=True)]
        return Column(grads)

    def weights(self) -> Column:
        """Return the weights as matrices: in their own memory, or copied now where they lie or are kept otherwise."""
        if self.copied:
            self.thetas = Column(_matrix(p.detach(), self.dtype) for p in self.parameters)
        return self.thetas

    def update(
        self,
        update: InPlaceUpdate,
        grads: Sequence[Tensor],
        priors: Sequence[Prior],
        scales: Sequence[Scale],
        clock: Clock,
    ) -> None:
        """Make a step of the rule, and leave what came of it where the parameters have theirs.

        ``grads`` and ``priors`` are of each parameter, ``scales`` of each group.
        """
        now = Clock(self.age + 1, clock.loss, clock.baseline)
        state = RuleState(self.slots, self.memory, self.tensors, now)
        update(self.weights(), grads, state, priors, [scales[m.group] for m in self.members])
        for i in self.copied:
            self.parameters[i].copy_(self.thetas[i].view(self.parameters[i].shape))
        for own in self.states:
            own["step"] = now.step
        if state.memory is not self.shown or not isinstance(state.memory, Tensor):
            for own, part in zip(self.states, self.rule.split_memory(state.memory, len(self.states)), strict=True):
                own.update((f"memory{k}", m) for k, m in enumerate(part))
        if self.rule.tensor_width:
            for own, tensor in zip(self.states, state.tensors.unbind(), strict=True):
                own["tensor"] = tensor
        self.memory, self.shown, self.tensors = state.memory, state.memory, state.tensors
        self.seen = [[*s.values()] for s in self.states]


def computing(p: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter is updated."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _matrix(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.dtype is not dtype or not tensor.is_contiguous():
        tensor = tensor.to(dtype).contiguous()
    return tensor if tensor.dim() == 2 else as_matrix(tensor)


def _same(state: State, values: list[Any]) -> bool:
    return len(state) == len(values) and all(map(operator.is_, state.values(), values))
