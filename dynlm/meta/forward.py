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

from dynlm.adapt import Step
from dynlm.meta.sampling import Stratum
from dynlm.optim.base import Clock, Coordinates, Observation, Prior, Rule, RuleState, Slots


class Tangents(NamedTuple):
    """Sampled coordinates of one tensor, their state, and the derivative of both by each meta-parameter."""

    stratum: Stratum
    theta: Tensor
    """(K,)"""
    slots: Slots
    memory: Slots
    """of ``Rule.tensor_step``"""
    dtheta: Tensor
    """(P, K)"""
    dslots: Slots
    dmemory: Slots


class _Advance(nn.Module):
    """One update of one tensor as a function of φ and of everything that φ has moved before."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(
        self, moved: tuple[Tensor, Slots, Slots], fixed: Coordinates, seen: tuple[Prior, Observation, Clock]
    ) -> tuple[Tensor, Slots, Slots]:
        theta, slots, memory = moved
        context, memory = self.rule.tensor_step(*seen, memory)
        theta, slots = self.rule.step(fixed._replace(theta=theta), slots, context)
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
        for theta, slots, memory, stratum in zip(thetas, state.slots, state.tensors, strata, strict=True):
            values = stratum.take(theta), tuple(map(stratum.take, slots)), tuple(memory)
            zeros: Any = torch.utils._pytree.tree_map(lambda x: x.new_zeros(self.n_phi, *x.shape), values)
            result.append(Tangents(stratum, *values, *zeros))
        return result

    def segment(
        self, tangents: Sequence[Tangents], step: Step, clock: Clock, priors: Sequence[Prior], weight: float
    ) -> list[Tangents]:
        """Add w_t ⟨g_t, dθ_t/dφ⟩ to φ's gradients, then advance; ``step`` and ``clock`` as for a recording."""
        new, total = [], torch.zeros(self.n_phi, dtype=torch.float64)
        for of_tensor, grad, seen, prior in zip(tangents, step.grads, step.seen, priors, strict=True):
            grad_K = of_tensor.stratum.take(grad)
            total += weight * of_tensor.stratum.weight * (of_tensor.dtheta @ grad_K).double().cpu()
            new.append(self._advance(of_tensor, grad_K, (prior, seen, clock)))
        for p, part in zip(self.phi.values(), total.split([p.numel() for p in self.phi.values()]), strict=True):
            of_p = part.view(p.shape).to(p)
            p.grad = of_p if p.grad is None else p.grad + of_p
        return new

    @torch.no_grad()
    def _advance(self, t: Tangents, grad_K: Tensor, seen: tuple[Prior, Observation, Clock]) -> Tangents:
        prior, observation, _ = seen
        columns = prior.theta0.shape[1]
        row_K, col_K = t.stratum.index_K // columns, t.stratum.index_K % columns
        row, col = tuple(x[row_K, 0] for x in observation.row), tuple(x[0, col_K] for x in observation.col)
        fixed = Coordinates(t.theta, t.stratum.take(prior.theta0), t.stratum.take(prior.rms), grad_K, row, col)
        phi = {f"rule.{name}": p.detach() for name, p in self.phi.items()}
        moved = t.theta, t.slots, t.memory

        def update(phi: dict[str, Tensor], moved: tuple[Tensor, Slots, Slots]) -> Any:
            return torch.func.functional_call(self.advance, phi, (moved, fixed, seen))

        def tangent(phi_dot: dict[str, Tensor], moved_dot: tuple[Tensor, Slots, Slots]) -> Any:
            return torch.func.jvp(update, (phi, moved), (phi_dot, moved_dot))[1]

        chunk = max(1, 2**22 // max(1, 64 * t.theta.numel()))  # directions at once: bounds what a step holds
        dots = torch.func.vmap(tangent, chunk_size=chunk)(self.basis, (t.dtheta, t.dslots, t.dmemory))
        return Tangents(t.stratum, *update(phi, moved), *dots)
