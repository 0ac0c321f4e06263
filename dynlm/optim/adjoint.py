"""A differentiable update in one node: the fused update forwards, its adjoint in C backwards.

Autograd through ``Rule.step`` keeps a few dozen tensors a step; this keeps the weight, the gradient and the state. The
plain reference is ``Rule.step`` itself (tests/optim/test_adjoint.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynlm.optim.base import Coordinates, Rule, Slots
from dynlm.optim.kernel import InPlaceUpdate, TracedKernels, Work, arrays_of
from dynlm.optim.source import adjoint_kernel, numbered


class FusedAdjoint:
    """Stands in for ``Rule.flat_step`` in ``Rule.update``: differentiable once in θ, θ0, g, the state and φ."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.forwards = rule, InPlaceUpdate(rule)
        self.kernels = TracedKernels(rule, adjoint_kernel)

    def __call__(self, w: Coordinates, slots: Slots, context_N: Tensor) -> tuple[Tensor, Slots]:
        there = w._replace(theta=w.theta.detach().clone(), theta0=w.theta0.detach(), grad=w.grad.detach())
        new = tuple(slot.detach().clone() for slot in slots)
        done = self.forwards.fused(Work([there], [there.theta], [there.grad], [new], context_N.detach()[None], 0, None))
        if not done or not self.kernels(len(w.row), len(w.col)).builds(w.theta.dtype):
            return self.rule.flat_step(w, slots, context_N)
        moving = context_N, w.theta, w.theta0, w.grad, *slots
        theta, *new_slots = _Node.apply(self, w, (there.theta, *new), *moving)  # type: ignore[no-untyped-call]
        return theta, tuple(new_slots)


class _Node(torch.autograd.Function):
    """(context, θ, θ0, g, state) ↦ (new θ, new state), which are worked out already."""

    @staticmethod
    def forward(ctx: Any, fused: FusedAdjoint, w: Coordinates, new: Slots, *moving: Tensor) -> Slots:
        context_N, theta, theta0, grad, *slots = (t.detach() for t in moving)
        ctx.fused, ctx.n_slots, ctx.n_row = fused, len(slots), len(w.row)
        # all that is large is saved, not kept: so a checkpoint can drop it
        ctx.save_for_backward(context_N, theta, theta0, w.rms, grad, *slots, *w.row, *w.col)
        return new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Tensor | None, ...]:
        context_N, theta, theta0, rms, grad, *others = (t.contiguous() for t in ctx.saved_tensors)
        slots, features, threads = others[: ctx.n_slots], others[ctx.n_slots :], torch.get_num_threads()
        d_theta, *d_slots = (adjoint.contiguous().clone() for adjoint in adjoints)
        d_grad, d_theta0 = torch.empty_like(grad), torch.empty_like(theta0)
        d_context = torch.zeros(threads, context_N.numel(), dtype=torch.float64)
        w = Coordinates(theta, theta0, rms, grad, tuple(features[: ctx.n_row]), tuple(features[ctx.n_row :]))
        adjoint_arrays = {"d_theta": d_theta, **numbered("d_slot", d_slots), "d_grad": d_grad, "d_theta0": d_theta0}
        context = {"threads": threads, "context": context_N, "context_grad": d_context}
        ctx.fused.kernels(len(w.row), len(w.col))({**context, **arrays_of(w, tuple(slots)), **adjoint_arrays})
        return None, None, None, d_context.sum(0).to(context_N), d_theta, d_theta0, d_grad, *d_slots
