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
from dynlm.optim.kernel import Fused, TracedKernels, Work, arrays_of
from dynlm.optim.source import adjoint_kernel, numbered


class FusedAdjoint:
    """Stands in for ``Rule.flat_step`` in ``Rule.update``: differentiable once in θ, θ0, g, the state and φ."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.forwards = rule, Fused(rule)
        self.kernels = TracedKernels(rule, adjoint_kernel)

    def __call__(self, w: Coordinates, slots: Slots, context_N: Tensor) -> tuple[Tensor, Slots]:
        work = Work([w], [slots], context_N[None], 0, None)
        if not (self.forwards.serves(work) and self.kernels(len(w.row), len(w.col)).builds(w.theta.dtype)):
            return self.rule.flat_step(w, slots, context_N)
        theta, *new = _Node.apply(self, w, context_N, w.theta, w.theta0, w.grad, *slots)  # type: ignore[no-untyped-call]
        return theta, tuple(new)


class _Node(torch.autograd.Function):
    """(context, θ, θ0, g, state) ↦ (new θ, new state)."""

    @staticmethod
    def forward(
        ctx: Any, fused: FusedAdjoint, w: Coordinates, context_N: Tensor, *moving: Tensor
    ) -> tuple[Tensor, ...]:
        theta, theta0, grad, *slots = (t.detach() for t in moving)
        new, new_slots = theta.clone(), tuple(slot.clone() for slot in slots)
        there = w._replace(theta=new, theta0=theta0, grad=grad)
        fused.forwards.step(there, new_slots, context_N.detach())
        ctx.fused, ctx.n_slots, ctx.n_row = fused, len(slots), len(w.row)
        # all that is large is saved, not kept: so a checkpoint can drop it
        ctx.save_for_backward(context_N, theta, theta0, w.rms, grad, *slots, *w.row, *w.col)
        return new, *new_slots

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
        return None, None, d_context.sum(0).to(context_N), d_theta, d_theta0, d_grad, *d_slots
