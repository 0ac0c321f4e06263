"""Learning the start θ0 of the inner loop: joint training, MAML, FOMAML, Reptile and implicit MAML, one signature.

A task is what the inner loop reads: pieces in order, each with the weight that its loss has in the outer loss
J = Σ_t w_t mean(ℓ_t(θ_t)). A few-shot task is k times the support with weight 0, then the query with weight 1; an
article is its segments, all with positive weights.

    joint     Σ_t w_t ∇ℓ_t(θ0)                      no inner loop: the start that adaptation was not thought of for
    maml      dJ/dθ0 through the inner loop         Finn et al. 2017, arXiv:1703.03400; memory grows with the steps
    fomaml    Σ_t w_t ∇ℓ_t(θ_t)                     the same with dθ_t/dθ0 = 1; a plain loop without a graph
    reptile   θ0 − θ_k                              Nichol et al. 2018, arXiv:1803.02999; every piece is learned from
    imaml     (1 + H/λ)⁻¹ ∇ℓ_query(θ*)              Rajeswaran et al. 2019, arXiv:1909.04630; θ* solves the proximal
              problem min ℓ_support(θ) + λ/2 |θ − θ0|², H is the Hessian of ℓ_support there; memory free of the steps
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dynlm.inner import InnerLoop, Snapshot, detach
from dynlm.meta.buffers import unchanged_buffers
from dynlm.meta.unroll import Unroll, UnrollConfig
from dynlm.models.params import as_matrix, split_like
from dynlm.models.recurrence import differentiable_twice
from dynlm.optim.handmade import SGD
from dynlm.types import DivergedError, InputError, Piece

Method = Literal["joint", "maml", "fomaml", "reptile", "imaml"]
METHODS: tuple[Method, ...] = ("joint", "maml", "fomaml", "reptile", "imaml")


class Task(NamedTuple):
    """What the inner loop reads, and what counts of it."""

    pieces: Sequence[Piece]
    weights: Sequence[float]

    @classmethod
    def few_shot(cls, support: Piece, query: Piece, steps: int) -> Task:
        """``steps`` updates on the support, then the query, which alone counts."""
        return cls([support] * steps + [query], [0.0] * steps + [1.0])


class OuterGradient(NamedTuple):
    """``loss``: the outer loss of the task; ``grads``: of θ0, (R, C) matrices in the order of the reader's priors."""

    loss: float
    grads: list[Tensor]


def outer_gradient(
    method: Method, reader: InnerLoop, task: Task, phi: Sequence[Tensor] = (), cg_steps: int = 5
) -> OuterGradient:
    """Return what ``method`` makes of one task at the start θ0 of ``reader.priors``.

    ``phi``: meta-parameters of the rule to differentiate too (maml and fomaml); their ``grad`` is added to. The weights
    of the model are θ0 afterwards, also after an exception.

    Raises:
        InputError: an unknown method, φ where the method has no gradient for it.
        DivergedError: a loss that is not finite.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if phi and method not in ("maml", "fomaml"):
        raise InputError(f"method {method!r} has no gradient of the rule's settings: use maml or fomaml, or phi_lr 0")
    with reader:
        if method == "maml" or phi:
            return _unrolled(reader, task, phi, order=2 if method == "maml" else 1)
        if method == "imaml":
            return _implicit(reader, task, cg_steps)
        return {"joint": _joint, "fomaml": _first_order, "reptile": _reptile}[method](reader, task)


def _unrolled(reader: InnerLoop, task: Task, phi: Sequence[Tensor], order: Literal[1, 2]) -> OuterGradient:
    """Unrolls all pieces but the last: no update follows that one, so its plain gradient is sent back to θ_k."""
    leaves = [prior.theta0.clone().requires_grad_() for prior in reader.priors]
    priors = [prior._replace(theta0=leaf) for prior, leaf in zip(reader.priors, leaves, strict=True)]
    pieces, weights = task.pieces[:-1], task.weights[:-1]
    total, outputs, position = 0.0, [], Snapshot(list(leaves), reader.rule.init(priors), None)
    if pieces:
        trust = reader.config.trust
        unroll = Unroll(reader.score, reader.rule, reader.adapted, priors, UnrollConfig(order=order), trust=trust)
        unrolled = unroll.run(position, pieces, weights)
        loss, position = unrolled.loss, unrolled.position
        total, outputs = _finite(loss.item(), reader), [loss] if loss.requires_grad else []
        for theta, end in zip(reader.thetas, position.thetas, strict=True):
            theta.copy_(end.detach())
    reader.hidden = detach(position.hidden)
    last = _weighted(reader, task.pieces[-1:], task.weights[-1:])
    cotangents = [torch.ones_like(x) for x in outputs] + last.grads
    torch.autograd.backward([*outputs, *position.thetas], cotangents, inputs=[*leaves, *phi])
    return OuterGradient(total + last.loss, [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])


def _joint(reader: InnerLoop, task: Task) -> OuterGradient:
    return _weighted(reader, task.pieces, task.weights)


def _weighted(reader: InnerLoop, pieces: Sequence[Piece], weights: Sequence[float]) -> OuterGradient:
    """Σ_t w_t mean(ℓ_t) and its gradient at the present weights, which stay; the hidden state is carried."""
    total, sums = 0.0, [torch.zeros_like(theta) for theta in reader.thetas]
    for piece, weight in zip(pieces, weights, strict=True):
        with torch.set_grad_enabled(weight != 0):
            losses, hidden = reader.score(*piece, reader.hidden)
            mean = losses.mean()
        reader.hidden = detach(hidden)
        if weight:
            total += weight * _finite(mean.item(), reader)
            add(sums, reader.gradient(mean), weight)
    return OuterGradient(total, sums)


def _first_order(reader: InnerLoop, task: Task) -> OuterGradient:
    total, sums = 0.0, [torch.zeros_like(theta) for theta in reader.thetas]
    last = len(task.pieces) - 1
    for t, (piece, weight) in enumerate(zip(task.pieces, task.weights, strict=True)):
        if t == last:  # no later piece would see the update
            loss, grads = _weighted(reader, [piece], [weight])
            total += loss
            add(sums, grads, 1.0)
            break
        step = reader.segment(*piece)
        if weight:
            total += weight * step.losses_S.mean().item()
            add(sums, step.grads, weight)
    return OuterGradient(total, sums)


def _reptile(reader: InnerLoop, task: Task) -> OuterGradient:
    """The loss is the mean over all pieces: weights say nothing here, as every piece is learned from."""
    total = sum(reader.segment(*piece).losses_S.mean().item() for piece in task.pieces)
    moved = [prior.theta0 - theta for prior, theta in zip(reader.priors, reader.thetas, strict=True)]
    return OuterGradient(total / len(task.pieces), moved)


def _implicit(reader: InnerLoop, task: Task, cg_steps: int) -> OuterGradient:
    """Pieces of weight 0 are the support, wherever they stand; the others are scored at the solution."""
    rule = reader.rule
    if not isinstance(rule, SGD) or rule.decay <= 0 or rule.lr <= 0:
        raise InputError(f"imaml needs the rule sgd with a positive decay = lr · λ, not {rule.name} {rule.settings()}")
    support = [piece for piece, weight in zip(task.pieces, task.weights, strict=True) if not weight]
    if not support:
        raise InputError("imaml needs pieces of weight 0, whose proximal problem is solved: use maml or fomaml")
    for piece in support:
        reader.segment(*piece)
    query = [(piece, weight) for piece, weight in zip(task.pieces, task.weights, strict=True) if weight]
    loss, grads = _weighted(reader, [piece for piece, _ in query], [weight for _, weight in query])
    hessian = _hessian(reader, list({id(piece[0]): piece for piece in support}.values()))
    strength = float((rule.decay / rule.lr).detach())
    g_N = torch.cat([g.flatten() for g in grads])
    x_N = conjugate_gradients(lambda v_N: v_N + hessian(v_N) / strength, g_N, cg_steps)
    return OuterGradient(loss, split_like(x_N, grads))


def _hessian(reader: InnerLoop, pieces: Sequence[Piece]) -> Callable[[Tensor], Tensor]:
    """v ↦ H v with the Hessian of the mean loss over ``pieces`` at the present weights, the hidden state left at 0."""
    with differentiable_twice(), unchanged_buffers():
        mean = torch.stack([reader.score(*piece, None)[0].mean() for piece in pieces]).mean()
        slopes = torch.autograd.grad(mean, reader.parameters, create_graph=True, materialize_grads=True)
    reached = [slope for slope in slopes if slope.requires_grad]

    def product(v_N: Tensor) -> Tensor:
        pairs = zip(split_like(v_N, slopes), slopes, strict=True)
        directions = [part for part, slope in pairs if slope.requires_grad]
        hv = torch.autograd.grad(reached, reader.parameters, directions, retain_graph=True, materialize_grads=True)
        return torch.cat([h.flatten() for h in hv])

    return product


def conjugate_gradients(product: Callable[[Tensor], Tensor], b_N: Tensor, steps: int) -> Tensor:
    """x with product(x) ≈ b after at most ``steps`` products; a direction of negative curvature ends it early."""
    x, residual = torch.zeros_like(b_N), b_N.clone()
    direction, square = residual.clone(), residual.dot(residual)
    for _ in range(steps):
        if square <= torch.finfo(b_N.dtype).eps ** 2 * b_N.dot(b_N):
            break
        image = product(direction)
        curvature = direction.dot(image)
        if curvature <= 0:
            break
        step = square / curvature
        x, residual = x + step * direction, residual - step * image
        square, before = residual.dot(residual), square
        direction = residual + (square / before) * direction
    return x if x.any() else b_N


def add(sums: Sequence[Tensor], grads: Sequence[Tensor], weight: float) -> None:
    """sums += weight · grads, in place."""
    for total, grad in zip(sums, grads, strict=True):
        total.add_(as_matrix(grad), alpha=weight)


def _finite(loss: float, reader: InnerLoop) -> float:
    if not math.isfinite(loss):
        raise DivergedError(f"outer loss is {loss} with rule {reader.rule.settings()}: lower its lr")
    return loss
