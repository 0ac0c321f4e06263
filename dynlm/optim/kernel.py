"""A rule's update in place, by the first of four backends that serves it, and the fused replay.

C traced from ``Rule.step`` takes all tensors in one pass over memory; a rule may bring a kernel of its own; on a GPU
with Triton ``torch.compile`` fuses the step; and torch does everything else with the same results, without a compiler,
for other dtypes, or with ``DYNLM_KERNEL=eager``. Plain references: ``Rule.update`` and ``Replay._plain_block``.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Hashable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlm.compiler import kernel_choice, supported, why_not
from dynlm.kernels import Kernel
from dynlm.optim.base import Coordinates, Prior, Rule, RuleState, Seen, Shared, Slots
from dynlm.optim.rounding import rounded
from dynlm.optim.source import numbered, replay_kernel, update_kernel
from dynlm.optim.trace import trace_step
from dynlm.types import InputError


class TracedKernels:
    """The kernels that one printer makes of a rule's step, each traced and printed when it is first asked for.

    Further arguments of a call go to the printer.
    """

    def __init__(self, rule: Rule, printer: Callable[..., Kernel]) -> None:
        self.rule, self.printer = rule, printer
        self._printed: dict[Hashable, Kernel] = {}

    def __call__(self, n_row: int, n_col: int, **options: Any) -> Kernel:
        key = (n_row, n_col, *options.values())
        if key not in self._printed:
            self._printed[key] = self.printer(trace_step(self.rule, n_row, n_col), **options)
        return self._printed[key]


class Scale(NamedTuple):
    """θ ← keep θ + lr (step(θ) − θ): a multiplier of the rule's update, and decoupled decay (1 − keep)."""

    lr: float = 1.0
    keep: float = 1.0


class Work(NamedTuple):
    """One update of n tensors: weights and slots change in place."""

    ws: Sequence[Coordinates]
    slots: Sequence[Slots]
    """bfloat16 where half the memory is wanted, rounded as ``age`` says"""
    context_nN: Tensor
    age: int
    scales: Sequence[Scale] | None
    """of each tensor; None where the rule's step is taken as it is"""

    def in_c(self) -> bool:
        """Return whether all that changes in place lies as kernels take it, and a compiler is there."""
        changing = [t for w, slots in zip(self.ws, self.slots, strict=True) for t in (w.theta, *slots)]
        return supported(*(w.theta for w in self.ws)) and all(t.is_contiguous() for t in changing)


class Backend(abc.ABC):
    """One way of doing an update."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    @abc.abstractmethod
    def serves(self, work: Work) -> bool:
        """Return whether this backend can do it."""

    def run(self, work: Work) -> None:
        """Do it, one tensor at a time."""
        for number, (w, slots, context_N) in enumerate(zip(work.ws, work.slots, work.context_nN, strict=True)):
            before = None if work.scales is None else w.theta.clone()
            for place, (slot, new) in enumerate(zip(slots, self.step(w, slots, context_N), strict=False)):
                slot.copy_(rounded(new, slot.dtype, work.age, number, place))
            if work.scales and before is not None:
                lr, keep = work.scales[number]
                w.theta.sub_(before).mul_(lr).add_(before, alpha=keep)

    @abc.abstractmethod
    def step(self, w: Coordinates, slots: Slots, context_N: Tensor) -> Slots:
        """Write the new weights of one tensor, and return its new slots where they are not written yet."""


class Fused(Backend):
    """C traced from the rule's step: all tensors in one pass over their memory."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule)
        self.kernels = TracedKernels(rule, update_kernel)

    def kernel(self, work: Work) -> Kernel:
        w, slots = work.ws[0], work.slots[0]
        state = "bf16" if slots and slots[0].dtype == torch.bfloat16 else "T"
        return self.kernels(len(w.row), len(w.col), state=state, scaled=work.scales is not None)

    def serves(self, work: Work) -> bool:
        return self.rule.traceable and work.in_c() and self.kernel(work).builds(work.context_nN.dtype)

    def run(self, work: Work) -> None:
        each = [arrays_of(w, slots) for w, slots in zip(work.ws, work.slots, strict=True)]
        for of_tensor, scale in zip(each, work.scales or (), strict=False):
            of_tensor.update(lr=scale.lr, keep=scale.keep)
        self.kernel(work)({"threads": torch.get_num_threads(), "age": work.age, "context": work.context_nN}, each)

    def step(self, w: Coordinates, slots: Slots, context_N: Tensor) -> Slots:
        self.run(Work([w], [slots], context_N[None], 0, None))
        return ()


class Own(Backend):
    """The C that a rule brings for a single tensor, which writes the slots itself."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule)
        self.kernels: dict[Hashable, Kernel | None] = {}

    def kernel(self, w: Coordinates) -> Kernel | None:
        shape = len(w.row), len(w.col)
        if shape not in self.kernels:
            self.kernels[shape] = self.rule.step_kernel(*shape)
        return self.kernels[shape]

    def serves(self, work: Work) -> bool:
        if self.rule.traceable or not work.in_c() or any(slot.dtype != work.context_nN.dtype for slot in work.slots[0]):
            return False  # it has no slots of half precision
        kernel = self.kernel(work.ws[0])
        return kernel is not None and kernel.builds(work.context_nN.dtype)

    def step(self, w: Coordinates, slots: Slots, context_N: Tensor) -> Slots:
        kernel = self.kernel(w)
        assert kernel is not None
        kernel({"threads": torch.get_num_threads(), "context": context_N, **arrays_of(w, slots)})
        return ()


class Plain(Backend):
    """The rule's step as it is."""

    def serves(self, work: Work) -> bool:
        return True

    def step(self, w: Coordinates, slots: Slots, context_N: Tensor) -> Slots:
        theta, new_slots = self.rule.flat_step(w, tuple(slot.to(w.theta.dtype) for slot in slots), context_N)
        w.theta.copy_(theta)
        return new_slots


class TorchCompiled(Plain):
    """``torch.compile`` makes one kernel of it: Triton on a GPU, anything with ``DYNLM_KERNEL=torch``."""

    compiled: Callable[[Coordinates, Slots, Tensor], Slots] | None = None

    def serves(self, work: Work) -> bool:
        chosen, on_gpu = os.environ.get("DYNLM_KERNEL"), work.context_nN.is_cuda
        asked = chosen == "torch" or (chosen != "eager" and on_gpu and find_spec("triton") is not None)
        return self.rule.traceable and asked

    def step(self, w: Coordinates, slots: Slots, context_N: Tensor) -> Slots:
        if self.compiled is None:
            self.compiled = torch.compile(super().step, dynamic=True)
        return self.compiled(w, slots, context_N)


class InPlaceUpdate:
    """Applies a rule in place, by the first backend that serves. Holds no state of the rule's.

    ``compiled``: None takes the fastest backend there is, False torch alone, and with True a missing compiler is an
    error.
    """

    def __init__(self, rule: Rule, compiled: bool | None = None) -> None:
        self.rule = rule
        if compiled and (reason := why_not()):
            raise InputError(f"read.kernel is 'compiled', but {reason}: install gcc, or use 'auto'")
        kernel_choice()  # a wrong one is told before anything is read
        kinds = (Plain,) if compiled is False else (Fused, Own, TorchCompiled, Plain)
        self.backends: list[Backend] = [kind(rule) for kind in kinds]
        self._known: tuple[object, Shared] | None = None

    @torch.no_grad()
    def __call__(
        self,
        thetas: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: RuleState,
        priors: Sequence[Prior],
        scales: Sequence[Scale] | None = None,
    ) -> Seen:
        """Update ``thetas`` and ``state`` in place; returns what was observed, for those who record it.

        Slots may be bfloat16 where the weights are float32. ``scales`` are of each tensor.
        """
        grads = [grad.resolve_neg() for grad in grads]  # of complex numbers: a sign beside the memory
        seen, state.memory = self.rule.observe(thetas, grads, state, priors)
        context_nN, state.tensors = self.rule.tensor_step(self._shared(priors, seen, state.clock.step), state.tensors)
        ws = [
            Coordinates(theta, prior.theta0, prior.rms, grad, row, col)
            for theta, prior, grad, row, col in zip(thetas, priors, grads, seen.rows, seen.cols, strict=True)
        ]
        scales = scales if scales and any(scale != Scale() for scale in scales) else None
        work = Work(ws, state.slots, context_nN.to(thetas[0].dtype), state.clock.step, scales)
        next(backend for backend in self.backends if backend.serves(work)).run(work)
        return seen

    def _shared(self, priors: Sequence[Prior], seen: Seen, step: int) -> Shared:
        """What the context reads. What it says of the priors is made once, as they do not change while reading."""
        scalars = seen.scalars
        key = scalars.dtype, scalars.device, [(p.name, p.mean_rms, p.relative_rms) for p in priors]
        if self._known is None or self._known[0] != key:
            self._known = key, self.rule.shared(priors, scalars, [step])
        now = torch.tensor([step], dtype=torch.float64, device=scalars.device)
        return self._known[1]._replace(scalars=scalars, step=now)


def arrays_of(w: Coordinates, slots: Slots) -> dict[str, Tensor | float]:
    """Return a tensor's sizes and arrays by the names that kernels give them."""
    rows, columns = w.theta.shape
    own = {"theta": w.theta, "theta0": w.theta0, "rms": w.rms, "grad": w.grad}
    features = numbered("row", w.row) | numbered("col", w.col)
    return {"R": rows, "C": columns, **own, **numbered("slot", slots), **features}


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
        self.kernels = TracedKernels(rule, replay_kernel)

    def __call__(self, work: ReplayWork, context_WN: Tensor) -> Tensor:
        """∂J/∂context, (W − 1, N) in double precision, from the contexts of all W − 1 steps."""
        threads = torch.get_num_threads()
        result = torch.zeros(threads, *context_WN.shape, dtype=torch.float64)
        arrays = {"theta": work.theta, "theta0": work.theta0, "rms": work.rms, "grad": work.grads_WK}
        arrays |= {"weight": work.weights_W, "place": work.place_2K, "context": context_WN.detach()}
        arrays |= {**numbered("slot", work.slots), **numbered("row", work.row), **numbered("col", work.col)}
        rows, columns = (features[0].shape[1] if features else 0 for features in (work.row, work.col))
        sizes = {"K": work.theta.shape[0], "steps": len(work.grads_WK) - 1, "R": rows, "C": columns, "threads": threads}
        self.kernels(len(work.row), len(work.col))({**sizes, **arrays, "context_grad": result})
        return result.sum(0)

    def serves(self, theta: Tensor, n_row: int, n_col: int) -> bool:
        """Return whether the kernel exists for these weights and numbers of features."""
        return self.kernels.rule.traceable and self.kernels(n_row, n_col).serves(theta)
