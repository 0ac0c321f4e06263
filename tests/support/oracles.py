"""Independent oracles of the meta-gradient: the same window unrolled by other means, any rule, any model.

``higher_loss`` lets the package ``higher`` (Grefenstette et al. 2019, arXiv:1910.01727) keep the fast weights;
``functional_loss`` is written by hand with ``torch.func.functional_call``. Both hold the whole graph of all segments,
the language model's too, and share nothing with dynlm.meta: ``backward()`` of what they return is the oracle.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynlm.inner import Scorer, Snapshot, detach
from dynlm.models.params import Adapted, as_matrix
from dynlm.models.recurrence import differentiable_twice
from dynlm.optim.base import Clock, Coordinates, Prior, Rule, RuleState

with warnings.catch_warnings():  # what Python says of higher 0.2.1 when it compiles it for the first time
    warnings.filterwarnings("ignore", "invalid escape sequence")
    warnings.filterwarnings("ignore", '"is" with', SyntaxWarning)
    import higher


@dataclass(frozen=True)
class Work:
    """A window to unroll, and how."""

    model: nn.Module
    scorer: Callable[[nn.Module], Scorer]
    """makes a scorer of a model: an oracle scores with a copy of the model"""
    rule: Rule
    adapted: Sequence[Adapted]
    priors: Sequence[Prior]
    start: Snapshot
    pieces: Sequence[tuple[Tensor, Tensor]]
    weights: Sequence[float]
    order: int = 1

    def leaves(self) -> list[Tensor]:
        """θ at the start in the parameters' shapes; a start that asks for a gradient gets one."""
        thetas = [t if t.requires_grad else t.detach().requires_grad_() for t in self.start.thetas]
        return [t.view(a.parameter.shape) for t, a in zip(thetas, self.adapted, strict=True)]

    def memories(self) -> list[dict[str, Any]]:
        """The rule's memory at the start, by tensor."""
        state = self.start.state
        observed = state.memory or [None] * len(state.slots)
        parts = zip(state.slots, observed, state.tensors[:, None], strict=True)
        return [{"slots": slots, "observed": observed, "tensor": tensor} for slots, observed, tensor in parts]

    def update(self, i: int, theta: Tensor, grad: Tensor | None, memory: dict[str, Any], clock: Clock) -> Tensor:
        """Tensor ``i`` after the rule's update; ``memory`` takes what the rule remembers."""
        prior, rule, grad = self.priors[i], self.rule, torch.zeros_like(theta) if grad is None else grad
        observed = None if memory["observed"] is None else [memory["observed"]]
        state = RuleState([memory["slots"]], observed, memory["tensor"], clock)
        seen, observed = rule.observe([as_matrix(theta).detach()], [as_matrix(grad).detach()], state, [prior])
        memory["observed"] = observed and observed[0]
        context, memory["tensor"] = rule.tensor_step(rule.shared([prior], seen.scalars, [clock.step]), memory["tensor"])
        w = Coordinates(as_matrix(theta), prior.theta0, prior.rms, as_matrix(grad), seen.rows[0], seen.cols[0])
        new, memory["slots"] = rule.flat_step(w, memory["slots"], context[0])
        return new.view(theta.shape)

    def tick(self, clock: Clock, mean: Tensor) -> Clock:
        """A clock that has ticked once more; the old one may still be in use."""
        clock = replace(clock)
        clock.tick(float(mean.detach()))
        return clock

    @contextmanager
    def kernels(self) -> Any:
        """For the second order, only kernels that have a second derivative."""
        with ExitStack() as stack:
            if self.order == 2:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
                stack.enter_context(differentiable_twice())
            yield


class Scored(nn.Module):
    """A model whose forward pass is its scorer's: what replaces the model's weights reaches every read of them."""

    def __init__(self, model: nn.Module, scorer: Callable[[nn.Module], Scorer]) -> None:
        super().__init__()
        self.model, self.scorer = model, scorer

    def forward(self, inputs_S: Tensor, targets_S: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        return self.scorer(self.model)(inputs_S, targets_S, hidden)


def functional_loss(work: Work) -> Tensor:
    """Σ_t w_t mean(ℓ_t) as one graph, by hand."""
    scored, thetas, memories = Scored(work.model, work.scorer), work.leaves(), work.memories()
    clock, hidden, total = work.start.state.clock, work.start.hidden, torch.zeros(())
    for piece, weight in zip(work.pieces, work.weights, strict=True):
        named = {f"model.{a.name}": theta for a, theta in zip(work.adapted, thetas, strict=True)}
        with work.kernels():
            losses_S, hidden = functional_call(scored, named, (*piece, hidden))
            mean, hidden = losses_S.mean(), detach(hidden)
            grads = torch.autograd.grad(
                mean, thetas, create_graph=work.order == 2, retain_graph=True, allow_unused=True
            )
        clock, total = work.tick(clock, mean), total + weight * mean
        steps = enumerate(zip(thetas, grads, memories, strict=True))
        thetas = [work.update(i, theta, grad, memory, clock) for i, (theta, grad, memory) in steps]
    return total


def higher_loss(work: Work) -> Tensor:
    """The same with the fast weights and the rule's memory in the keeping of ``higher``."""
    scored = Scored(work.model, work.scorer)
    optimizer = RuleOptimizer([a.parameter for a in work.adapted])
    clock, hidden, total = work.start.state.clock, work.start.hidden, torch.zeros(())
    callback = detach if work.order == 1 else None
    with higher.innerloop_ctx(scored, optimizer, override={"work": [work]}) as (fast, inner):
        start = {id(a.parameter): leaf for a, leaf in zip(work.adapted, work.leaves(), strict=True)}
        fast.update_params([start.get(id(p), p) for p in scored.parameters()])
        inner.state = [dict(enumerate(work.memories()))]
        for piece, weight in zip(work.pieces, work.weights, strict=True):
            with work.kernels():
                losses_S, hidden = fast(*piece, hidden)
                mean, hidden = losses_S.mean(), detach(hidden)
                inner.clock = clock = work.tick(clock, mean)
                inner.step(mean, grad_callback=callback)
            total = total + weight * mean
    return total


class RuleOptimizer(torch.optim.Optimizer):
    """What ``higher`` asks for: the adapted parameters as an optimizer's group. It is never stepped itself."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, {"work": None})


class DifferentiableRule(higher.optim.DifferentiableOptimizer):
    """A rule as ``higher`` runs it."""

    clock: Clock

    def _update(self, grouped_grads: list[list[Tensor | None]], **ignored: Any) -> None:
        (group,), (grads,), (memories,) = self.param_groups, grouped_grads, self.state
        thetas = group["params"]
        for i, (theta, grad) in enumerate(zip(thetas, grads, strict=True)):
            thetas[i] = group["work"].update(i, theta, grad, memories[i], self.clock)


higher.register_optim(RuleOptimizer, DifferentiableRule)

ORACLES = {"higher": higher_loss, "functional": functional_loss}
