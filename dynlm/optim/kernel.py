"""The fused step and the fused replay: one pass over memory, in C traced from ``Rule.step``.

The plain references are ``Rule.update`` and ``Replay._plain_block``. Without a compiler, for other dtypes, or with
``DYNLM_KERNEL=eager``, torch does everything with the same results; on a GPU with Triton ``torch.compile`` fuses it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Hashable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlm.compiler import build, find_compiler, pointer, pointers, supported
from dynlm.optim.base import Coordinates, Prior, Rule, RuleState, Seen, Slots
from dynlm.optim.source import replay_source, update_source
from dynlm.optim.trace import Traced, trace_step
from dynlm.types import InputError


class TracedFunctions:
    """The C functions that one printer makes of a rule's step, each traced and built when it is first asked for.

    Further arguments of a call go to the printer.
    """

    def __init__(self, rule: Rule, source: Callable[..., str], name: str) -> None:
        self.rule, self.source, self.name = rule, source, name
        self._built: dict[Hashable, Any] = {}

    def __call__(self, dtype: torch.dtype, n_row: int, n_col: int, **options: Any) -> Any:
        key = (dtype, n_row, n_col, *options.values())
        if key not in self._built:
            traced: Traced = trace_step(self.rule, n_row, n_col)
            self._built[key] = getattr(build(self.source(traced, **options), dtype), self.name)
        return self._built[key]


class Scale(NamedTuple):
    """θ ← keep θ + lr (step(θ) − θ): a multiplier of the rule's update, and decoupled decay (1 − keep)."""

    lr: float = 1.0
    keep: float = 1.0


class FusedStep:
    """Applies a rule in place, all tensors in one call. Holds no state of its own."""

    def __init__(self, rule: Rule, compiled: bool | None = None) -> None:
        self.rule = rule
        if compiled and find_compiler() is None:
            raise InputError("read.kernel is 'compiled', but no C compiler was found: install gcc, or use 'auto'")
        self.compiled = find_compiler() is not None if compiled is None else compiled
        self.functions = TracedFunctions(rule, update_source, "step")
        self.own: dict[Hashable, Any] = {}
        self.torch_compiled: Callable[..., None] | None = None

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
        seen, state.memory = self.rule.observe(thetas, grads, state, priors)
        shared = self.rule.shared(priors, seen.scalars, [state.clock.step])
        context_nN, state.tensors = self.rule.tensor_step(shared, state.tensors)
        context_nN = context_nN.to(thetas[0].dtype)
        ws = [
            Coordinates(theta, prior.theta0, prior.rms, grad, row, col)
            for theta, prior, grad, row, col in zip(thetas, priors, grads, seen.rows, seen.cols, strict=True)
        ]
        fused = self.compiled and supported(*thetas)
        if fused and self.rule.traceable:
            self.fused(ws, state.slots, context_nN, scale)
            return seen
        one_step = self._plain_step
        if fused and self.rule.step_source(0, 0):
            one_step = self._own_step
        elif self.rule.traceable and _torch_compiles(thetas[0]):
            one_step = self._torch_step
        for w, slots, context_N in zip(ws, state.slots, context_nN, strict=True):
            before = None if scale in (None, Scale()) else w.theta.clone()
            one_step(w, slots, context_N)
            if scale and before is not None:
                w.theta.sub_(before).mul_(scale.lr).add_(before, alpha=scale.keep)
        return seen

    def fused(self, ws: Sequence[Coordinates], slots: Sequence[Slots], context_nN: Tensor, scale: Scale | None) -> None:
        """The update of n tensors in one pass over their memory."""
        first, scaled = ws[0], scale is not None and scale != Scale()
        state = "bf16" if slots[0] and slots[0][0].dtype == torch.bfloat16 else "T"
        function = self.functions(first.theta.dtype, len(first.row), len(first.col), state=state, scaled=scaled)
        tensors = [
            t
            for w, of_tensor in zip(ws, slots, strict=True)
            for t in (w.theta, w.theta0, w.rms, w.grad, *of_tensor, *w.row, *w.col)
        ]
        tensors = [t if t.is_contiguous() else t.contiguous() for t in tensors]
        assert all(w.theta.is_contiguous() for w in ws), "weights must be contiguous to change in place"
        dims, scale = [n for w in ws for n in w.theta.shape], scale or Scale()
        function(
            ctypes.c_long(len(ws)),
            (ctypes.c_long * len(dims))(*dims),
            ctypes.c_int(torch.get_num_threads()),
            pointer(context_nN.contiguous()),
            ctypes.c_double(scale.lr),
            ctypes.c_double(scale.keep),
            pointers(tensors),
        )

    def _own_step(self, w: Coordinates, slots: Slots, context_N: Tensor) -> None:
        """By the rule's own C, one tensor at a time."""
        shape = w.theta.dtype, len(w.row), len(w.col)
        if shape not in self.own:
            source = self.rule.step_source(*shape[1:])
            assert source is not None
            self.own[shape] = build(source, w.theta.dtype).step
        rows, columns = map(ctypes.c_long, w.theta.shape)
        fields = [w.theta, w.theta0, w.rms, w.grad.contiguous(), *slots, *w.row, *w.col]
        threads = ctypes.c_int(torch.get_num_threads())
        self.own[shape](rows, columns, threads, pointer(context_N.contiguous()), pointers(fields))

    def _torch_step(self, w: Coordinates, slots: Slots, context_N: Tensor) -> None:
        """By ``torch.compile``, which makes one kernel of the scalar code: Triton on a GPU."""
        if self.torch_compiled is None:

            def step(w: Coordinates, slots: Slots, context: Slots) -> None:
                theta, new_slots = self.rule.step(w, slots, context, expand=True)
                w.theta.copy_(theta)
                for slot, new in zip(slots, new_slots, strict=True):
                    slot.copy_(new)

            self.torch_compiled = torch.compile(step, dynamic=True)
        self.torch_compiled(w, slots, self.rule.split(context_N))

    def _plain_step(self, w: Coordinates, slots: Slots, context_N: Tensor) -> None:
        theta, new_slots = self.rule.flat_step(w, tuple(slot.to(w.theta.dtype) for slot in slots), context_N)
        w.theta.copy_(theta)
        for slot, new in zip(slots, new_slots, strict=True):
            slot.copy_(new)


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
        self.functions = TracedFunctions(rule, replay_source, "replay")

    def __call__(self, work: ReplayWork, context_WN: Tensor) -> Tensor:
        """∂J/∂context, (W − 1, N) in double precision, from the contexts of all W − 1 steps."""
        threads = torch.get_num_threads()
        result = torch.zeros(threads, *context_WN.shape, dtype=torch.float64)
        fields = [work.theta, work.theta0, work.rms, work.grads_WK, work.weights_W]
        tensors = [t.contiguous() for t in (*fields, *work.slots, *work.row, *work.col)]
        window, n = work.grads_WK.shape
        lengths = [features[0].shape[1] if features else 0 for features in (work.row, work.col)]
        numbers, place = context_WN.detach().contiguous(), work.place_2K.contiguous()
        self.functions(work.theta.dtype, len(work.row), len(work.col))(
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
