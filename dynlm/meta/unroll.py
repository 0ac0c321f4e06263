"""The unroll engine: read a window as one autograd graph, of first or second order, in checkpointed slices.

Only the rule's updates are nodes that stay. The language model is run on leaves that share the storage of θ_t
(:func:`dynlm.models.params.pointed`), its gradient is taken at once, and its graph is freed; what remains in the meta
graph is one node a segment that knows g_t. Backwards it sends w_t g_t to θ_t, and for the second order runs its segment
again for the Hessian-vector product H_t v that the cotangent v of g_t asks for.

Slices are recomputed on the way back (``torch.utils.checkpoint``, Chen et al. 2016, arXiv:1604.06174; its theory for
unrolls: Gruslys et al. 2016, arXiv:1606.03401), nested ones too, with dropout replayed and buffers as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from dynlm.allocator import give_back_memory
from dynlm.inner import Scorer, Snapshot, detach, largest_norms, within_trust
from dynlm.meta.buffers import BufferLog, unchanged_buffers
from dynlm.meta.slices import SliceCost
from dynlm.models.params import Adapted, as_matrix, pointed
from dynlm.models.recurrence import differentiable_twice
from dynlm.optim.adjoint import FusedAdjoint
from dynlm.optim.base import Prior, Rule, RuleState
from dynlm.settings import Count, Settings
from dynlm.types import InputError, Piece

NODE_BYTES = (
    1800  # about what a node takes with the hooks of a checkpoint: measured over 1,024 segments of the gated rule
)


@dataclass(frozen=True)
class UnrollConfig(Settings):
    """How a window is unrolled."""

    order: Literal[1, 2] = 1
    """1: gradients are inputs without derivative; 2: differentiate through them too"""
    slices: tuple[Count, ...] = ()
    """segments of a checkpointed slice, from the outermost level inwards; none keeps the whole graph"""
    fused: bool = True
    """one node an update, with its adjoint in C, where the rule and the machine allow it; False: torch's autograd"""


class Unrolled(NamedTuple):
    """A window as a graph: differentiable in φ, and in the start's tensors and the priors' θ0 that ask for it."""

    loss: Tensor
    """Σ_t w_t mean(ℓ_t(θ_t)), nats"""
    means: tuple[float, ...]
    """mean(ℓ_t) of each segment"""
    position: Snapshot
    """after the last segment; detach it to carry it on into the next window"""


class Unroll:
    """Unrolls a rule over segments. Any rule, any module: ``score`` says what a segment's losses are."""

    def __init__(
        self,
        score: Scorer,
        rule: Rule,
        adapted: Sequence[Adapted],
        priors: Sequence[Prior],
        config: UnrollConfig,
        *,
        trust: float = 0.0,
    ) -> None:
        if list(config.slices) != sorted(config.slices, reverse=True):
            raise InputError(f"slices {config.slices} must fall from the outermost level inwards")
        self.score, self.rule, self.adapted, self.priors, self.config = score, rule, adapted, priors, config
        self.largest = largest_norms(priors, trust)
        self.step = FusedAdjoint(rule) if config.fused else None

    def run(self, start: Snapshot, pieces: Sequence[Piece], weights: Sequence[float]) -> Unrolled:
        """Unroll ``pieces`` from ``start``, which is left as it was. Hidden states are detached between segments."""
        if not pieces:
            raise InputError("no segment to unroll")
        if len(weights) != len(pieces):
            raise InputError(f"{len(pieces)} segments, but {len(weights)} weights: give each segment one")
        thetas = [theta if theta.requires_grad else theta.detach().requires_grad_() for theta in start.thetas]
        return self._run(start._replace(thetas=thetas), pieces, weights, self.config.slices)

    def _run(
        self, position: Snapshot, pieces: Sequence[Piece], weights: Sequence[float], slices: tuple[int, ...]
    ) -> Unrolled:
        loss, means = position.thetas[0].new_zeros(()), tuple[float, ...]()
        n = slices[0] if slices else 1
        for first in range(0, len(pieces), n):
            part = pieces[first : first + n], weights[first : first + n]
            if slices:
                unrolled = self._slice(position, *part, slices[1:])
            else:
                unrolled = self._segment(position, part[0][0], part[1][0])
            loss, means, position = loss + unrolled.loss, means + unrolled.means, unrolled.position
        return Unrolled(loss, means, position)

    def _slice(
        self, position: Snapshot, pieces: Sequence[Piece], weights: Sequence[float], slices: tuple[int, ...]
    ) -> Unrolled:
        """:meth:`_run`, recomputed on the way back.

        The position goes in as separate tensors, as those alone are an outer slice's to recompute: whatever else a
        slice is called with is kept, and nested slices would keep as much as the inner ones alone.
        """
        thetas, state, hidden = position
        leaves, spec = tree_flatten((thetas, state.slots, state.memory, state.tensors, hidden))
        clock = state.clock  # the function below must not hold on to the rest of the state

        def run(*leaves: Any) -> Unrolled:
            give_back_memory()
            thetas, slots, memory, tensors, hidden = tree_unflatten(leaves, spec)
            start = Snapshot(thetas, RuleState(slots, memory, tensors, clock), hidden)
            return self._run(start, pieces, weights, slices)

        log = BufferLog()
        unrolled: Unrolled = checkpoint(run, *leaves, use_reentrant=False, context_fn=lambda: (log.recording(), log))
        return unrolled

    def _segment(self, position: Snapshot, piece: Piece, weight: float) -> Unrolled:
        thetas, state = position.thetas, position.state
        scoring = _Scoring(self, piece, position.hidden)
        mean, *grads = _Score.apply(scoring, *thetas)  # type: ignore[no-untyped-call]
        clock = replace(state.clock)
        clock.tick(float(mean.detach()))
        thetas, state = self.rule.update(thetas, grads, replace(state, clock=clock), self.priors, self.step)
        return Unrolled(weight * mean, (clock.loss,), Snapshot(thetas, state, scoring.hidden))

    def cost(self, position: Snapshot, piece: Piece) -> SliceCost:
        """Return what a position and the graph of one segment keep, measured on this one."""
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        thetas = [theta.detach().requires_grad_() for theta in position.thetas]
        fixed = {t.data_ptr() for prior in self.priors for t in (prior.theta0, prior.rms)}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), unchanged_buffers():
            unrolled = self._segment(position._replace(thetas=thetas), piece, 1.0)
        ends = [unrolled.loss, *(slot for of_tensor in unrolled.position.state.slots for slot in of_tensor)]
        nodes = count_nodes([*ends, *unrolled.position.thetas])
        slots = [slot for of_tensor in position.state.slots for slot in of_tensor]
        size = sum(t.numel() * t.element_size() for t in (*thetas, *slots))
        tensors = sum(n for address, n in kept.items() if address not in fixed)
        return SliceCost(size, tensors, NODE_BYTES * nodes)

    def trusted(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients as the rule sees them: (R, C), inside the reader's trust region."""
        matrices = [as_matrix(g.contiguous()) for g in grads]  # of a convolution it may be channels-last
        return within_trust(matrices, self.largest)[0]

    @contextmanager
    def model_graph(self) -> Iterator[None]:
        """A graph of the language model alone: on, in memory of its own, differentiable twice where that is asked."""
        keep = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)  # not the checkpoint's to recompute
        with ExitStack() as stack:
            for context in (torch.enable_grad(), keep, second_order() if self.config.order == 2 else nullcontext()):
                stack.enter_context(context)
            yield


def count_nodes(outputs: Sequence[Tensor]) -> int:
    """Nodes of the graph behind some tensors."""
    waiting, seen = [t.grad_fn for t in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return len(seen)


@contextmanager
def second_order() -> Iterator[None]:
    """Inside, everything has a second derivative: attention takes its MATH form, and recurrent layers no fused one.

    The flash, memory-efficient and cuDNN kernels have none; what was set before is set again afterwards.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False), differentiable_twice():
        yield


class _Scoring:
    """One segment's losses and gradients at given weights; remembers the random state and the buffers, so that they are
    the same when the segment is run again."""

    def __init__(self, unroll: Unroll, piece: Piece, hidden: Any) -> None:
        self.unroll, self.piece, self.start = unroll, piece, hidden
        self.hidden: Any = None
        self.devices = [piece[0].device.index] if piece[0].is_cuda else []
        self.buffers = BufferLog()
        self.rng = torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.devices)

    def first(self, leaves: Sequence[Tensor]) -> Tensor:
        """Return the mean loss, for the first time."""
        with self.buffers.recording() if self.unroll.config.order == 2 else nullcontext():
            return self._mean_loss(leaves)

    def _mean_loss(self, leaves: Sequence[Tensor]) -> Tensor:
        with pointed(self.unroll.adapted, leaves):
            losses_S, hidden = self.unroll.score(*self.piece, self.start)
        self.hidden = detach(hidden)
        return losses_S.mean()

    def again(self, leaves: Sequence[Tensor]) -> Tensor:
        """Return the mean loss once more, for its second derivative."""
        with torch.random.fork_rng(self.devices), self.buffers:
            torch.set_rng_state(self.rng[0])
            for device, state in zip(self.devices, self.rng[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            return self._mean_loss(leaves)


class _Score(torch.autograd.Function):
    """θ_t ↦ (mean loss, g_t): a node of the meta graph that keeps θ_t and g_t, not the language model's graph."""

    @staticmethod
    def forward(ctx: Any, scoring: _Scoring, *thetas: Tensor) -> tuple[Tensor, ...]:
        leaves = [theta.detach().requires_grad_() for theta in thetas]
        with scoring.unroll.model_graph():
            mean = scoring.first(leaves)
            grads = scoring.unroll.trusted(torch.autograd.grad(mean, leaves, materialize_grads=True))
        ctx.scoring, ctx.second = scoring, scoring.unroll.config.order == 2
        ctx.save_for_backward(*(thetas if ctx.second else grads))
        if not ctx.second:
            ctx.mark_non_differentiable(*grads)
        return mean.detach(), *grads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, *grad_grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.second:
            return None, *(grad_mean * g for g in ctx.saved_tensors)
        leaves = [theta.detach().requires_grad_() for theta in ctx.saved_tensors]
        with ctx.scoring.unroll.model_graph():
            mean = ctx.scoring.again(leaves)
            slopes = torch.autograd.grad(mean, leaves, create_graph=True, materialize_grads=True)
            grads = ctx.scoring.unroll.trusted(slopes)
        pairs = [(g, v) for g, v in zip(grads, grad_grads, strict=True) if g.requires_grad]
        outputs, cotangents = [mean, *(g for g, _ in pairs)], [torch.zeros_like(mean), *(v for _, v in pairs)]
        curved = torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True)
        return None, *(grad_mean * g.detach() + c for g, c in zip(grads, curved, strict=True))
