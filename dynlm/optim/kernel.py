"""The fused step and the fused replay: one pass over memory, in C traced from ``Rule.step``.

The plain references are ``Rule.update`` and ``dynlm.meta.replay.replay_eagerly``. Without a compiler, on other devices
and dtypes, or with ``DYNLM_KERNEL=eager``, everything runs in torch with the same results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlm.compiler import build, find_compiler, pointer, pointers, supported
from dynlm.optim.base import Coordinates, Observation, Prior, Rule, RuleState, Slots
from dynlm.optim.source import replay_source, update_source
from dynlm.optim.trace import Traced, trace_step
from dynlm.types import InputError

Kernel = Callable[[Coordinates, Slots, Tensor], None]


class TracedFunctions:
    """The C functions that one printer makes of a rule's step, each traced and built when it is first asked for."""

    def __init__(self, rule: Rule, source: Callable[[Traced], str], name: str) -> None:
        self.rule, self.source, self.name = rule, source, name
        self._built: dict[tuple[object, ...], Any] = {}

    def __call__(self, dtype: torch.dtype, n_row: int, n_col: int, context: Slots) -> Any:
        key = (dtype, n_row, n_col, *(tuple(t.shape) for t in context))
        if key not in self._built:
            traced = trace_step(self.rule, n_row, n_col, context)
            self._built[key] = getattr(build(self.source(traced), dtype), self.name)
        return self._built[key]


class FusedStep:
    """Applies a rule in place, tensor by tensor. Holds no state of its own."""

    def __init__(self, rule: Rule, compiled: bool | None = None) -> None:
        self.rule = rule
        if compiled and find_compiler() is None:
            raise InputError("read.kernel is 'compiled', but no C compiler was found: install gcc, or use 'auto'")
        self.compiled = find_compiler() is not None if compiled is None else compiled
        self.functions = TracedFunctions(rule, update_source, "step")

    @torch.no_grad()
    def __call__(
        self, thetas: Sequence[Tensor], grads: Sequence[Tensor], state: RuleState, priors: Sequence[Prior]
    ) -> list[Observation]:
        """Update ``thetas`` and ``state`` in place; returns what was observed, for those who record it."""
        seen = []
        for i, (theta, grad, prior) in enumerate(zip(thetas, grads, priors, strict=True)):
            observation, state.memory[i] = self.rule.observe(grad, prior, state.memory[i], state.clock)
            context, state.tensors[i] = self.rule.tensor_step(prior, observation, state.clock, state.tensors[i])
            w = Coordinates(theta, prior.theta0, prior.rms, grad, observation.row, observation.col)
            if self.compiled and self.rule.traceable and supported(theta):
                self.kernel(w, context)(w, state.slots[i], flat_context(context, theta))
            else:
                _plain_step(self.rule, w, state.slots[i], context)
            seen.append(observation)
        return seen

    def kernel(self, w: Coordinates, context: Slots) -> Kernel:
        """The in-place update for these shapes of context and numbers of features."""
        return _update_kernel(self.functions(w.theta.dtype, len(w.row), len(w.col), context))


def _plain_step(rule: Rule, w: Coordinates, slots: Slots, context: Slots) -> None:
    theta, new_slots = rule.step(w, slots, context)
    w.theta.copy_(theta)
    for slot, new in zip(slots, new_slots, strict=True):
        slot.copy_(new)


def flat_context(context: Slots, like: Tensor) -> Tensor:
    """All context numbers in one vector of ``like``'s dtype, differentiable in φ."""
    if not context:
        return like.new_empty(0)
    return torch.cat([t.reshape(-1).to(like) for t in context])


def _update_kernel(function: Any) -> Kernel:
    def kernel(w: Coordinates, slots: Slots, context: Tensor) -> None:
        tensors = [w.theta, w.theta0, w.rms, w.grad, *slots, *w.row, *w.col]
        tensors = [t if t.is_contiguous() else t.contiguous() for t in tensors]
        assert tensors[0] is w.theta, "weights must be contiguous to change in place"
        rows, columns = map(ctypes.c_long, w.theta.shape)
        function(rows, columns, ctypes.c_int(torch.get_num_threads()), pointer(context), pointers(tensors))

    return kernel


class ReplayWork(NamedTuple):
    """K coordinates of one tensor over a window of W segments (W − 1 updates)."""

    theta: Tensor
    theta0: Tensor
    rms: Tensor
    slots: Slots
    grads_WK: Tensor
    weights_W: Tensor
    """∂J/∂θ_t is weights_W[t] × grads_WK[t]; the first is unused"""
    place_2K: Tensor
    """row and column of each coordinate, int32"""
    row: Slots
    """row features, each (W, R)"""
    col: Slots
    """column features, each (W, C)"""


class FusedReplay:
    """Replays windows of one rule, forwards through the updates and back, in one pass over the recorded gradients."""

    def __init__(self, rule: Rule) -> None:
        self.functions = TracedFunctions(rule, replay_source, "replay")

    def __call__(self, work: ReplayWork, context: Slots, context_WN: Tensor) -> Tensor:
        """∂J/∂context, (W − 1, N) in double precision.

        ``context`` gives the shapes of one step's context, ``context_WN`` the flat numbers of all W − 1 steps.
        """
        threads = torch.get_num_threads()
        result = torch.zeros(threads, *context_WN.shape, dtype=torch.float64)
        fields = [work.theta, work.theta0, work.rms, work.grads_WK, work.weights_W]
        tensors = [t.contiguous() for t in (*fields, *work.slots, *work.row, *work.col)]
        window, n = work.grads_WK.shape
        lengths = [features[0].shape[1] if features else 0 for features in (work.row, work.col)]
        numbers, place = context_WN.detach().contiguous(), work.place_2K.contiguous()
        self.functions(work.theta.dtype, len(work.row), len(work.col), context)(
            ctypes.c_long(n),
            ctypes.c_long(window),
            ctypes.c_int(threads),
            (ctypes.c_long * 3)(*lengths, n),
            pointer(numbers),
            pointer(result),
            pointer(place),
            pointers(tensors),
        )
        return result.sum(0)
