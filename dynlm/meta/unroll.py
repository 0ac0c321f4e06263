"""The reference meta-gradient: read a window as one autograd graph and backpropagate through it.

Every θ_t is a graph tensor; the model runs on it through ``torch.func.functional_call``, so tied tensors stay tied.
Plain and memory-hungry on purpose: dynlm.meta.replay gives the same first-order gradient at a fraction of the cost, and
the test that both agree to rounding is the keel of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dynlm.adapt import Scorer, Snapshot, detach
from dynlm.models.params import Adapted, as_matrix
from dynlm.models.recurrence import differentiable_twice
from dynlm.optim.base import Prior, Rule


class _Scoring(nn.Module):
    """A scorer as a module, so that its model's parameters can be swapped for graph tensors."""

    def __init__(self, model: nn.Module, score: Scorer) -> None:
        super().__init__()
        self.model = model
        self.score = score

    def forward(self, inputs_S: Tensor, targets_S: Tensor, hidden: object) -> tuple[Tensor, object]:
        return self.score(inputs_S, targets_S, hidden)


class Unroll:
    """Unrolls a rule over segments of text. ``second_order`` differentiates through the gradients too."""

    def __init__(
        self, model: nn.Module, score: Scorer, rule: Rule, adapted: Sequence[Adapted], priors: Sequence[Prior]
    ) -> None:
        self.scoring, self.rule = _Scoring(model, score), rule
        self.adapted, self.priors = adapted, priors

    def meta_loss(
        self,
        start: Snapshot,
        pieces: Sequence[tuple[Tensor, Tensor]],
        weights: Sequence[float],
        second_order: bool = False,
    ) -> Tensor:
        """Σ_t w_t mean(ℓ_t(θ_t(φ))): call ``backward`` on it. ``start`` is left as it was.

        The rule's inputs are detached except θ and its own state (first order); hidden states are detached always.
        """
        thetas = [theta.detach().requires_grad_() for theta in start.thetas]
        state, hidden = start.state, start.hidden
        total = thetas[0].new_zeros(())
        clock = type(state.clock)(state.clock.step, state.clock.loss, state.clock.baseline)
        for (inputs_S, targets_S), weight in zip(pieces, weights, strict=True):
            parameters = {
                f"model.{a.name}": theta.view(a.parameter.shape) for a, theta in zip(self.adapted, thetas, strict=True)
            }
            with differentiable_twice() if second_order else nullcontext():
                losses_S, hidden = torch.func.functional_call(self.scoring, parameters, (inputs_S, targets_S, hidden))
            hidden = detach(hidden)
            mean = losses_S.mean()
            total = total + weight * mean
            grads = torch.autograd.grad(
                mean, thetas, retain_graph=True, create_graph=second_order, materialize_grads=True
            )
            if not second_order:
                grads = tuple(g.detach() for g in grads)
            clock.tick(mean.item())
            state = type(state)(state.slots, state.memory, clock)
            thetas, state = self.rule.update(thetas, [as_matrix(g) for g in grads], state, self.priors)
        return total
