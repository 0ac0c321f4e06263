"""The replay engine: exact first-order meta-gradients without a language-model pass or a double backward.

With recorded gradients g_t held fixed, coordinates are independent, and the meta-gradient is that of the surrogate

    J(φ) = Σ_t w_t ⟨g_t, θ_t(φ)⟩.

So the rule alone is run again over the recorded g_t and backpropagated through: in one fused pass (dynlm.optim.kernel),
or block of coordinates by block in torch. Since J
is a sum over coordinates, a random sample of them, weighted by inverse inclusion probability, gives an unbiased
estimate: O(T·K) floats are stored, K ≪ N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dynlm.adapt import Reader, Step
from dynlm.compiler import supported
from dynlm.optim.base import Clock, Coordinates, Observation, Prior, Rule, Slots
from dynlm.optim.kernel import ReplayWork, flat_context, fused_replay


class Stratum(NamedTuple):
    """Sampled coordinates of one tensor: flat positions (K,), and the weight 1 / inclusion probability of each."""

    index_K: Tensor
    weight: float


def sample_coordinates(
    sizes: Sequence[int], n_sampled: int, generator: torch.Generator, smallest: int = 1024
) -> list[Stratum]:
    """One stratum a tensor, in proportion to its size but at least ``smallest`` coordinates (all, if it has fewer).

    Within a tensor one coordinate is drawn from each of K equal intervals, so rows are covered evenly; a tensor whose
    share is its size is taken whole. ``n_sampled`` of 0 takes everything.
    """
    total = sum(sizes)
    strata = []
    for size in sizes:
        share = size if n_sampled == 0 else min(size, max(smallest, round(n_sampled * size / total)))
        offsets = torch.rand(share, generator=generator, dtype=torch.float64)
        index = ((torch.arange(share) + offsets) * (size / share)).long().clamp_(max=size - 1)
        strata.append(Stratum(torch.arange(size) if share == size else index, size / share))
    return strata


@dataclass
class Recording:
    """What one window of reading leaves for the replay: everything is detached."""

    priors: Sequence[Prior]
    strata: Sequence[Stratum]
    theta: list[Tensor]
    """θ at the window's start, (K,) a tensor"""
    slots: list[Slots]
    grads: list[list[Tensor]] = field(default_factory=list)
    """[step][tensor] (K,)"""
    seen: list[list[Observation]] = field(default_factory=list)
    clocks: list[Clock] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    @classmethod
    def begin(cls, reader: Reader, strata: Sequence[Stratum]) -> Recording:
        """Take the reader's present position as the start of the window."""
        theta = [_take(t, s) for t, s in zip(reader.thetas, strata, strict=True)]
        slots = [tuple(_take(x, s) for x in xs) for xs, s in zip(reader.state.slots, strata, strict=True)]
        return cls(reader.priors, strata, theta, slots)

    def add(self, step: Step, clock: Clock, weight: float) -> None:
        """Record one segment; ``weight`` is w_t, ``clock`` as the rule's update saw it."""
        self.grads.append([_take(g, s) for g, s in zip(step.grads, self.strata, strict=True)])
        self.seen.append(step.seen)
        self.clocks.append(Clock(clock.step, clock.loss, clock.baseline))
        self.weights.append(weight)


def _take(matrix_RC: Tensor, stratum: Stratum) -> Tensor:
    return matrix_RC.reshape(-1)[stratum.index_K]


def replay(rule: Rule, recording: Recording, block: int = 32768) -> None:
    """Add ∇φ J to the rule's gradients, in fused kernels where they exist, else block by block in torch."""
    if len(recording.weights) < 2:
        return  # no update moves a loss of this window
    if not supported(recording.theta[0]):
        replay_eagerly(rule, recording, block)
        return
    for tensor in range(len(recording.strata)):
        _replay_fused(rule, recording, tensor)


def replay_eagerly(rule: Rule, recording: Recording, block: int = 32768) -> None:
    """The plain form of :func:`replay`: autograd through ``Rule.step``. Peak memory is one block's unroll."""
    for tensor, stratum in enumerate(recording.strata):
        for start in range(0, stratum.index_K.numel(), block):
            _replay_block(rule, recording, tensor, slice(start, start + block))


def _replay_fused(rule: Rule, recording: Recording, tensor: int) -> None:
    stratum, prior = recording.strata[tensor], recording.priors[tensor]
    theta, slots = recording.theta[tensor], recording.slots[tensor]
    seen = [step[tensor] for step in recording.seen[:-1]]
    contexts = [rule.context(prior, s, clock) for s, clock in zip(seen, recording.clocks[:-1], strict=True)]
    context_WN = torch.stack([flat_context(context, theta) for context in contexts])
    if not context_WN.requires_grad:
        return  # a rule without meta-parameters
    grads_WK = torch.stack([step[tensor] for step in recording.grads])
    weights_W = grads_WK.new_tensor(recording.weights) * stratum.weight
    columns = prior.theta0.shape[1]
    work = ReplayWork(
        theta,
        prior.theta0.reshape(-1)[stratum.index_K],
        prior.rms.reshape(-1)[stratum.index_K],
        slots,
        grads_WK,
        weights_W[:, None] * grads_WK,
        torch.stack([stratum.index_K // columns, stratum.index_K % columns]).int(),
        tuple(torch.stack([s.row[k].reshape(-1) for s in seen]) for k in range(len(seen[0].row))),
        tuple(torch.stack([s.col[k].reshape(-1) for s in seen]) for k in range(len(seen[0].col))),
    )
    context_WN.backward(fused_replay(rule, work, contexts[0], context_WN).to(context_WN))


def _replay_block(rule: Rule, recording: Recording, tensor: int, block: slice) -> None:
    stratum, prior = recording.strata[tensor], recording.priors[tensor]
    index_K = stratum.index_K[block]
    columns = prior.theta0.shape[1]
    row_K, col_K = index_K // columns, index_K % columns
    theta0, rms = prior.theta0.reshape(-1)[index_K], prior.rms.reshape(-1)[index_K]
    theta = recording.theta[tensor][block]
    slots = tuple(slot[block] for slot in recording.slots[tensor])
    thetas, cotangents = [], []
    for t in range(len(recording.weights) - 1):  # the last update moves no loss of this window
        seen = recording.seen[t][tensor]
        w = Coordinates(
            theta,
            theta0,
            rms,
            recording.grads[t][tensor][block],
            tuple(x[row_K, 0] for x in seen.row),
            tuple(x[0, col_K] for x in seen.col),
        )
        theta, slots = rule.step(w, slots, rule.context(prior, seen, recording.clocks[t]))
        thetas.append(theta)
        weight = recording.weights[t + 1] * stratum.weight
        cotangents.append(weight * recording.grads[t + 1][tensor][block])
    if thetas and thetas[-1].requires_grad:
        torch.autograd.backward(thetas, cotangents)
