"""Forward mode: the meta-gradient as it accrues, without a recording and without truncation.

With gradients held fixed, dθ_t/dφ obeys a recursion that is diagonal in the coordinates: each carries P tangents of its
weight and state, one a meta-parameter, and every segment adds w_t ⟨g_t, dθ_t/dφ⟩ (Williams & Zipser 1989 for recurrent
networks). P × K numbers are kept whatever the length, so this is for rules with few meta-parameters, or for samples of
few coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynlm.inner import Update
from dynlm.meta.sampling import Stratum
from dynlm.models.params import split_like
from dynlm.optim.base import Clock, Coordinates, Prior, Rule, RuleState, Shared, Slots


class Tangents(NamedTuple):
    """Sampled coordinates of one tensor, their state, and the derivative of both by each meta-parameter."""

    stratum: Stratum
    theta: Tensor
    """(K,)"""
    slots: Slots
    memory: Tensor
    """of ``Rule.tensor_step`` (1, M)"""
    dtheta: Tensor
    """(P, K)"""
    dslots: Slots
    dmemory: Tensor


Moved = tuple[Tensor, Slots, Tensor]
"""weights, slots and the memory of one tensor"""


class _Advance(nn.Module):
    """One update of one tensor as a function of φ and of everything that φ has moved before."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, moved: Moved, fixed: Coordinates, shared: Shared) -> Moved:
        theta, slots, memory = moved
        context_1N, memory = self.rule.tensor_step(shared, memory)
        theta, slots = self.rule.flat_step(fixed._replace(theta=theta), slots, context_1N[0])
        return theta, slots, memory


class Forward:
    """Carries tangents along a reading and adds ∇φ to the rule's gradients, segment by segment."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.advance = rule, _Advance(rule)
        self.phi = {name: p for name, p in rule.named_parameters() if p.numel()}
        self.n_phi = sum(p.numel() for p in self.phi.values())
        self.basis: dict[str, Tensor] = {}
        offset = 0
        for name, p in self.phi.items():  # (P, *shape): the unit vectors of φ, seen by this parameter
            unit = torch.zeros(self.n_phi, p.numel(), dtype=p.dtype, device=p.device)
            unit[offset : offset + p.numel()] = torch.eye(p.numel(), dtype=p.dtype, device=p.device)
            self.basis[f"rule.{name}"] = unit.view(self.n_phi, *p.shape)
            offset += p.numel()

    def begin(self, thetas: Sequence[Tensor], state: RuleState, strata: Sequence[Stratum]) -> list[Tangents]:
        """No φ has moved anything yet."""
        result = []
        for theta, slots, memory, stratum in zip(thetas, state.slots, state.tensors[:, None], strata, strict=True):
            values = stratum.take(theta), tuple(map(stratum.take, slots)), memory.clone()
            zeros: Any = torch.utils._pytree.tree_map(lambda x: x.new_zeros(self.n_phi, *x.shape), values)
            result.append(Tangents(stratum, *values, *zeros))
        return result

    def segment(
        self, tangents: Sequence[Tangents], step: Update, clock: Clock, priors: Sequence[Prior], weight: float
    ) -> list[Tangents]:
        """Add w_t ⟨g_t, dθ_t/dφ⟩ to φ's gradients, then advance; ``step`` and ``clock`` as for a recording."""
        new, total = [], torch.zeros(self.n_phi, dtype=torch.float64)
        assert step.seen is not None, "an update was read"
        for i, (of_tensor, grad, prior) in enumerate(zip(tangents, step.grads, priors, strict=True)):
            grad_K = of_tensor.stratum.take(grad)
            total += weight * of_tensor.stratum.weight * (of_tensor.dtheta @ grad_K).double().cpu()
            shared = self.rule.shared([prior], step.seen.scalars[i : i + 1], [clock.step])
            row_K, col_K = _places(of_tensor.stratum, prior)
            row = tuple(x[row_K, 0] for x in step.seen.rows[i])
            col = tuple(x[0, col_K] for x in step.seen.cols[i])
            take = of_tensor.stratum.take
            fixed = Coordinates(of_tensor.theta, take(prior.theta0), take(prior.rms), grad_K, row, col)
            new.append(self._advance(of_tensor, fixed, shared))
        add_gradient(list(self.phi.values()), total)
        return new

    @torch.no_grad()
    def _advance(self, t: Tangents, fixed: Coordinates, shared: Shared) -> Tangents:
        phi = {f"rule.{name}": p.detach() for name, p in self.phi.items()}
        moved = t.theta, t.slots, t.memory

        def update(phi: dict[str, Tensor], moved: Moved) -> Any:
            return torch.func.functional_call(self.advance, phi, (moved, fixed, shared))

        def tangent(phi_dot: dict[str, Tensor], moved_dot: Moved) -> Any:
            return torch.func.jvp(update, (phi, moved), (phi_dot, moved_dot))[1]

        chunk = max(1, 2**22 // max(1, 64 * t.theta.numel()))  # directions at once: bounds what a step holds
        dots = torch.func.vmap(tangent, chunk_size=chunk)(self.basis, (t.dtheta, t.dslots, t.dmemory))
        return Tangents(t.stratum, *update(phi, moved), *dots)


def add_gradient(phi: Sequence[nn.Parameter], gradient_P: Tensor) -> None:
    """Add a gradient that is flat over ``phi`` to each parameter's own."""
    add_gradients(phi, split_like(gradient_P, phi))


def add_gradients(parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Add to the gradient of each parameter its own; None where there is none."""
    for p, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            of_p = grad.to(p)
            p.grad = of_p if p.grad is None else p.grad + of_p


def _places(stratum: Stratum, prior: Prior) -> tuple[Tensor, Tensor]:
    """Row and column of each sampled coordinate."""
    columns = prior.theta0.shape[1]
    return stratum.index_K // columns, stratum.index_K % columns
