"""A rule's update in place, by the first of four backends that serves it, and the fused replay.

C traced from ``Rule.step`` takes all tensors in one pass over memory; a rule may bring a kernel of its own; on a GPU
with Triton ``torch.compile`` fuses the step; and torch does everything else with the same results, without a compiler,
for other dtypes, or with ``DYNLM_KERNEL=eager``. Plain references: ``Rule.update`` and ``Replay._plain_block``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlm.compiler import kernel_choice, supported, why_not
from dynlm.kernels import Column, Kernel
from dynlm.optim.base import Coordinates, Prior, Rule, RuleState, Seen, Shared, Slots, columns_of
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
        key = (n_row, n_col, *sorted(options.items()))
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
    thetas: Sequence[Tensor]
    grads: Sequence[Tensor]
    slots: Sequence[Slots]
    """bfloat16 where half the memory is wanted, rounded as ``age`` says"""
    context_nN: Tensor
    age: int
    scales: Sequence[Scale] | None
    """of each tensor; None where the rule's step is taken as it is"""

    def in_c(self) -> bool:
        """Return whether all that changes in place lies as kernels take it, and a compiler is there."""
        changing = (self.thetas, *columns_of(self.slots))
        return supported(*self.thetas) and all(t.is_contiguous() for column in changing for t in column)


class InPlaceUpdate:
    """Applies a rule in place. Its backends are asked in turn to do it and say whether they have.

    Holds no state of the rule's. ``compiled``: False leaves the plain backend alone; with True a missing compiler is an
    error.
    """

    def __init__(self, rule: Rule, compiled: bool | None = None) -> None:
        self.rule = rule
        if compiled and (reason := why_not()):
            raise InputError(f"kernel is 'compiled', but {reason}: install gcc, or use 'auto'", setting="read.kernel")
        kernel_choice()  # a wrong one is told before anything is read
        fast = [] if compiled is False else [self.fused, self.own, self.torch_compiled]
        self.backends = [*fast, self.plain]
        self.kernels = TracedKernels(rule, update_kernel)
        self._own: dict[Hashable, Kernel | None] = {}
        self._compiled: Callable[[Coordinates, Slots, Tensor], Slots] | None = None
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
        if any(grad.is_neg() for grad in grads):  # of complex numbers: a sign beside the memory
            grads = [grad.resolve_neg() for grad in grads]
        thetas, grads = (part if isinstance(part, Column) else Column(part) for part in (thetas, grads))
        seen, state.memory = self.rule.observe(thetas, grads, state, priors)
        context_nN, state.tensors = self.rule.tensor_step(self._shared(priors, seen, state.clock.step), state.tensors)
        ws = [
            Coordinates(theta, prior.theta0, prior.rms, grad, row, col)
            for theta, prior, grad, row, col in zip(thetas, priors, grads, seen.rows, seen.cols, strict=True)
        ]
        scales = scales if scales and any(scale != Scale() for scale in scales) else None
        work = Work(ws, thetas, grads, state.slots, context_nN.to(thetas[0].dtype), state.clock.step, scales)
        next(backend for backend in self.backends if backend(work))  # who has done it is the last to be asked
        return seen

    def _shared(self, priors: Sequence[Prior], seen: Seen, step: int) -> Shared:
        """Return what the context reads. What it says of the priors is made once: they stay as they are."""
        scalars = seen.scalars
        key = scalars.dtype, scalars.device, [(p.theta0.shape, p.mean_rms, p.relative_rms) for p in priors]
        if self._known is None or self._known[0] != key:
            self._known = key, self.rule.shared(priors, scalars, [step])
        now = torch.tensor([step], dtype=torch.float64, device=scalars.device)
        return self._known[1]._replace(scalars=scalars, step=now)

    def fused(self, work: Work) -> bool:
        """Run C traced from the rule's step: all tensors in one pass over their memory."""
        if not (self.rule.traceable and work.in_c()):
            return False
        w, slots = work.ws[0], work.slots[0]
        state = "bf16" if slots and slots[0].dtype == torch.bfloat16 else "T"
        kernel = self.kernels(len(w.row), len(w.col), state=state, scaled=work.scales is not None)
        if not kernel.builds(w.theta.dtype):
            return False
        n_rows, n_columns = zip(*(theta.shape for theta in work.thetas), strict=True)
        rms, theta0, rows, cols = zip(*((w.rms, w.theta0, w.row, w.col) for w in work.ws), strict=True)
        each = {"R": n_rows, "C": n_columns, "theta": work.thetas, "theta0": theta0, "rms": rms, "grad": work.grads}
        for name, columns in (("slot", columns_of(work.slots)), ("row", columns_of(rows)), ("col", columns_of(cols))):
            each |= numbered(name, columns)
        if work.scales:
            each |= {"lr": [scale.lr for scale in work.scales], "keep": [scale.keep for scale in work.scales]}
        taken = {name: each[name] for name in kernel.each.names}
        kernel({"threads": torch.get_num_threads(), "age": work.age, "context": work.context_nN}, taken)
        return True

    def own(self, work: Work) -> bool:
        """Run the C that a rule brings for one tensor, which writes its slots itself, none of half precision."""
        w, slots = work.ws[0], work.slots[0]
        if self.rule.traceable or not work.in_c() or any(slot.dtype != w.theta.dtype for slot in slots):
            return False
        shape = len(w.row), len(w.col)
        if shape not in self._own:
            self._own[shape] = self.rule.step_kernel(*shape)
        kernel = self._own[shape]
        if kernel is None or not kernel.builds(w.theta.dtype):
            return False

        def step(w: Coordinates, slots: Slots, context_N: Tensor) -> Slots:
            kernel({"threads": torch.get_num_threads(), "context": context_N, **arrays_of(w, slots)})
            return ()

        return _one_by_one(work, step)

    def torch_compiled(self, work: Work) -> bool:
        """Let ``torch.compile`` make one kernel of the step: Triton on a GPU, anything with ``DYNLM_KERNEL=torch``."""
        triton = work.context_nN.is_cuda and find_spec("triton") is not None
        if not self.rule.traceable or not (kernel_choice() == "torch" or (kernel_choice() != "eager" and triton)):
            return False
        self._compiled = self._compiled or torch.compile(self._step, dynamic=True)
        return _one_by_one(work, self._compiled)

    def plain(self, work: Work) -> bool:
        """Take the rule's step as it is."""
        return _one_by_one(work, self._step)

    def _step(self, w: Coordinates, slots: Slots, context_N: Tensor) -> Slots:
        theta, new_slots = self.rule.flat_step(w, tuple(slot.to(w.theta.dtype) for slot in slots), context_N)
        w.theta.copy_(theta)
        return new_slots


def _one_by_one(work: Work, step: Callable[[Coordinates, Slots, Tensor], Slots]) -> bool:
    """Go by a ``step`` that writes the weights of one tensor, and returns its new slots if it has not written them."""
    for number, (w, slots, context_N) in enumerate(zip(work.ws, work.slots, work.context_nN, strict=True)):
        before = w.theta.clone() if work.scales else w.theta
        for place, (slot, new) in enumerate(zip(slots, step(w, slots, context_N), strict=False)):
            slot.copy_(rounded(new, slot.dtype, work.age, number, place))
        if work.scales:
            lr, keep = work.scales[number]
            w.theta.sub_(before).mul_(lr).add_(before, alpha=keep)
    return True


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
