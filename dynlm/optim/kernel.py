"""The fused step and the fused replay: one pass over memory, in C traced from ``Rule.step``.

The plain references are ``Rule.update`` and ``Replay._plain_block``. Without a compiler, for other dtypes, or with
``DYNLM_KERNEL=eager``, torch does everything with the same results; on a GPU with Triton ``torch.compile`` fuses it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dynlm.compiler import kernel_choice, supported, why_not
from dynlm.kernels import Each, Kernel
from dynlm.optim.base import Coordinates, Prior, Rule, RuleState, Seen, Slots
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


class FusedStep:
    """Applies a rule in place, all tensors in one call. Holds no state of its own."""

    def __init__(self, rule: Rule, compiled: bool | None = None) -> None:
        self.rule = rule
        if compiled and (reason := why_not()):
            raise InputError(f"read.kernel is 'compiled', but {reason}: install gcc, or use 'auto'")
        kernel_choice()  # a wrong one is told before anything is read
        self.compiled = compiled is not False
        self.kernels = TracedKernels(rule, update_kernel)
        self.own: dict[Hashable, Kernel | None] = {}
        self.torch_compiled: Callable[..., Slots] | None = None

    @torch.no_grad()
    def __call__(
        self,
        thetas: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: RuleState,
        priors: Sequence[Prior],
        scale: Scale | None = None,
    ) -> Seen:
        """Update ``thetas`` and ``state`` in place; returns what was observed, for those who record it.

        Slots may be bfloat16 where the weights are float32.
        """
        grads = [grad.resolve_neg() for grad in grads]  # of complex numbers: a sign beside the memory
        seen, state.memory = self.rule.observe(thetas, grads, state, priors)
        shared = self.rule.shared(priors, seen.scalars, [state.clock.step])
        context_nN, state.tensors = self.rule.tensor_step(shared, state.tensors)
        context_nN = context_nN.to(thetas[0].dtype)
        ws = [
            Coordinates(theta, prior.theta0, prior.rms, grad, row, col)
            for theta, prior, grad, row, col in zip(thetas, priors, grads, seen.rows, seen.cols, strict=True)
        ]
        scale = None if scale == Scale() else scale
        possible = self.compiled and supported(*thetas) and _contiguous(thetas, state.slots)
        kernel = self.kernel(ws[0], state.slots[0], scale) if possible else None
        served = kernel is not None and kernel.builds(thetas[0].dtype)
        if served and self.rule.traceable:
            self.fused(ws, state.slots, context_nN, scale, state.clock.step)
            return seen
        one_step = self._plain_step
        if served:
            one_step = self._own_step
        elif self.rule.traceable and _torch_compiles(thetas[0]):
            one_step = self._torch_step
        for number, (w, slots, context_N) in enumerate(zip(ws, state.slots, context_nN, strict=True)):
            before = None if scale is None else w.theta.clone()
            for place, (slot, new) in enumerate(zip(slots, one_step(w, slots, context_N), strict=False)):
                slot.copy_(rounded(new, slot.dtype, state.clock.step, number, place))
            if scale and before is not None:
                w.theta.sub_(before).mul_(scale.lr).add_(before, alpha=scale.keep)
        return seen

    def kernel(self, like: Coordinates, slots: Slots, scale: Scale | None) -> Kernel | None:
        """Of a traceable rule the step of all tensors, of others the one that they bring for a single tensor."""
        shape = len(like.row), len(like.col)
        if self.rule.traceable:
            state = "bf16" if slots and slots[0].dtype == torch.bfloat16 else "T"
            return self.kernels(*shape, state=state, scaled=scale is not None)
        if any(slot.dtype != like.theta.dtype for slot in slots):
            return None  # a rule's own kernel has no slots of half precision
        if shape not in self.own:
            self.own[shape] = self.rule.step_kernel(*shape)
        return self.own[shape]

    def fused(
        self, ws: Sequence[Coordinates], slots: Sequence[Slots], context_nN: Tensor, scale: Scale | None, age: int = 0
    ) -> None:
        """The update of n tensors in one pass over their memory; ``age`` decides how bfloat16 slots are rounded."""
        kernel, factors = self.kernel(ws[0], slots[0], scale), scale or Scale()
        assert kernel is not None
        each = [Each(w.theta.shape, arrays_of(w, of_tensor)) for w, of_tensor in zip(ws, slots, strict=True)]
        sizes, context = (torch.get_num_threads(), age), {"context": context_nN}
        kernel(sizes, context, numbers=(factors.lr, factors.keep), each=each)

    def _own_step(self, w: Coordinates, slots: Slots, context_N: Tensor) -> Slots:
        """By the rule's own C, one tensor at a time, which writes the slots itself."""
        kernel = self.kernel(w, slots, None)
        assert kernel is not None
        arrays = {"context": context_N, **arrays_of(w, slots)}
        kernel((*w.theta.shape, torch.get_num_threads()), arrays)
        return ()

    def _torch_step(self, w: Coordinates, slots: Slots, context_N: Tensor) -> Slots:
        """By ``torch.compile``, which makes one kernel of the scalar code: Triton on a GPU."""
        if self.torch_compiled is None:

            def step(w: Coordinates, slots: Slots, context: Slots) -> Slots:
                theta, new_slots = self.rule.step(w, slots, context)
                w.theta.copy_(theta)
                return new_slots

            self.torch_compiled = cast(Callable[..., Slots], torch.compile(cast(Any, step), dynamic=True))
        wide = tuple(slot.to(w.theta.dtype) for slot in slots)
        return self.torch_compiled(w, wide, self.rule.split(context_N))

    def _plain_step(self, w: Coordinates, slots: Slots, context_N: Tensor) -> Slots:
        theta, new_slots = self.rule.flat_step(w, tuple(slot.to(w.theta.dtype) for slot in slots), context_N)
        w.theta.copy_(theta)
        return new_slots


def arrays_of(w: Coordinates, slots: Slots) -> dict[str, Tensor]:
    """A tensor's arrays by the names that kernels give them."""
    own = {"theta": w.theta, "theta0": w.theta0, "rms": w.rms, "grad": w.grad}
    return own | numbered("slot", slots) | numbered("row", w.row) | numbered("col", w.col)


def _contiguous(thetas: Sequence[Tensor], slots: Sequence[Slots]) -> bool:
    """Whether all that changes in place lies as kernels take it."""
    return all(t.is_contiguous() for t in thetas) and all(t.is_contiguous() for of_one in slots for t in of_one)


def _torch_compiles(like: Tensor) -> bool:
    """On a GPU with Triton; anywhere with ``DYNLM_KERNEL=torch``."""
    chosen = os.environ.get("DYNLM_KERNEL")
    return chosen == "torch" or (chosen != "eager" and like.is_cuda and find_spec("triton") is not None)


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
        steps, n = work.grads_WK.shape[0] - 1, work.theta.shape[0]
        lengths = [features[0].shape[1] if features else 0 for features in (work.row, work.col)]
        kernel = self.kernels(len(work.row), len(work.col))
        kernel((n, steps, threads, *lengths), {**arrays, "context_grad": result})
        return result.sum(0)

    def serves(self, theta: Tensor, n_row: int, n_col: int) -> bool:
        """Whether the kernel exists for these weights and numbers of features."""
        return self.kernels.rule.traceable and self.kernels(n_row, n_col).serves(theta)
