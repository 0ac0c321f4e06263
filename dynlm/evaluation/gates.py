"""COPY, UPDATE and FLUSH of any rule while it reads, by tensor and over time: the derivatives of its step.

    COPY = ∂θ_{t+1}/∂θ_t        UPDATE = −∂θ_{t+1}/∂g_t · static RMS        FLUSH = ∂θ_{t+1}/∂θ0

UPDATE is in the weight's units: how far a gradient of typical size moves it. What the network of a learned cell puts
out counts as a constant here, so that of gated, diagonal and MLP cells, and of hand-made rules that are linear in θ_t,
g_t and θ0, these are the gates themselves. Of others they are slopes where the rule stands, and may be far from the
step: Adam's first step divides g by |g|, so its slope is almost zero. COPY + FLUSH = 1 for every rule that knows θ by
θ − θ0 alone.

A step is elementwise, so the gradient of its sum holds the derivatives of all coordinates at once. They are taken of a
fixed sample of each tensor, in double precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from dynlm.inner import InnerLoop, Observer, Scored, Update
from dynlm.optim.base import Coordinates, Prior, Rule, Slots
from dynlm.optim.learned import Learned
from dynlm.results import GateSizes

SAMPLE = 512
"""coordinates of a tensor, at the most"""
GATES = ("copy", "update", "flush")


class Gates(NamedTuple):
    """What a method's updates did, as means over the sampled coordinates of each of n tensors."""

    values_3Un: Tensor
    """(3, updates, n) float32: COPY, UPDATE, FLUSH, in reading order"""
    tensors: list[str]
    weights: list[int]
    """weights of each tensor"""
    segments: list[int]
    """updates of each article"""

    def summary(self) -> GateSizes:
        """Names, counts, and means over all updates."""
        means_3n = self.values_3Un.double().mean(1)
        return {
            "tensors": self.tensors,
            "weights": self.weights,
            "segments": self.segments,
            "mean": dict(zip(GATES, means_3n.tolist(), strict=True)),
        }


class Sample(NamedTuple):
    """Coordinates of one tensor: rows and columns (K,)."""

    row_K: Tensor
    col_K: Tensor

    def take(self, matrix: Tensor) -> Tensor:
        """(R, C, …) to (K, …), in double precision; (R, 1) and (1, C) count as matrices of equal columns or rows."""
        row_K = self.row_K if matrix.shape[0] > 1 else torch.zeros_like(self.row_K)
        col_K = self.col_K if matrix.shape[1] > 1 else torch.zeros_like(self.col_K)
        return matrix[row_K, col_K].double()


def draw_sample(shape: Sequence[int], size: int, generator: torch.Generator) -> Sample:
    """One coordinate from each of ``size`` equal intervals of an (R, C) matrix; all where it has no more."""
    rows, columns = shape
    n = rows * columns
    index_K = torch.arange(n)
    if size < n:
        offset_K = torch.rand(size, generator=generator, dtype=torch.float64)
        index_K = ((torch.arange(size) + offset_K) * (n / size)).long().clamp_(max=n - 1)
    return Sample(index_K // columns, index_K % columns)


class GateRecorder(Observer):
    """Looks on while a loop updates its weights; neither scores nor updates change by a bit."""

    def __init__(self, reader: InnerLoop, size: int = SAMPLE) -> None:
        self.reader = reader
        generator = torch.Generator().manual_seed(0)
        self.samples: list[Sample] = []
        for theta in reader.thetas:
            sample = draw_sample(theta.shape, size, generator)
            self.samples.append(Sample(*(index_K.to(theta.device) for index_K in sample)))
        self.priors = [sample_prior(p, s) for p, s in zip(reader.priors, self.samples, strict=True)]
        self.values: list[Tensor] = []
        self.segments: list[int] = []

    @contextmanager
    def article(self) -> Iterator[None]:
        """Inside, every update of the loop is recorded, as one of the next article."""
        before = len(self.values)
        try:
            with self.reader.observed_by(self):
                yield
        finally:
            self.segments.append(len(self.values) - before)

    def scored(self, scored: Scored) -> None:
        """Keep the sampled coordinates as they are before the update, which changes weights and state in place."""
        if scored.mean is not None:
            state = self.reader.state
            self.theta = [s.take(theta) for s, theta in zip(self.samples, self.reader.thetas, strict=True)]
            self.slots: list[Slots] = [
                tuple(s.take(slot) for slot in slots) for s, slots in zip(self.samples, state.slots, strict=True)
            ]
            self.tensors = state.tensors.clone()

    def learned(self, update: Update) -> None:
        """Record (3, n) in double precision: COPY, UPDATE, FLUSH of each tensor in the update that was made."""
        rule, seen = self.reader.rule, update.seen
        assert seen is not None  # an update was made
        clock_step = self.reader.state.clock.step
        context_nN, _ = rule.tensor_step(rule.shared(self.reader.priors, seen.scalars, [clock_step]), self.tensors)
        context_nN = context_nN.to(self.reader.thetas[0].dtype)  # rounded as the update rounds it
        values = []
        for i, (sample, prior, context_N) in enumerate(zip(self.samples, self.priors, context_nN, strict=True)):
            row, col = (tuple(map(sample.take, features[i])) for features in (seen.rows, seen.cols))
            w = Coordinates(self.theta[i], prior.theta0, prior.rms, sample.take(update.grads[i]), row, col)
            values.append(step_gates(rule, w, self.slots[i], context_N))
        self.values.append(torch.stack(values, 1).cpu())

    def gates(self) -> Gates | None:
        """Return all that was recorded; None where no update was."""
        if not self.values:
            return None
        weights = [prior.theta0.numel() for prior in self.reader.priors]
        names = [prior.name for prior in self.reader.priors]
        return Gates(torch.stack(self.values, 1).float(), names, weights, self.segments)


def sample_prior(prior: Prior, sample: Sample) -> Prior:
    return prior._replace(theta0=sample.take(prior.theta0), rms=sample.take(prior.rms))


@contextmanager
def held_gates(rule: Rule) -> Iterator[None]:
    """What the network of a learned cell puts out is a constant inside."""
    if not isinstance(rule, Learned):
        yield
        return
    rule.holds_gates = True
    try:
        yield
    finally:
        rule.holds_gates = False


def step_gates(rule: Rule, w: Coordinates, slots: Slots, context_N: Tensor) -> Tensor:
    """Return (3,) COPY, UPDATE and FLUSH of one step, means over the coordinates (K,) given."""
    theta, grad, theta0 = (x.detach().requires_grad_() for x in (w.theta, w.grad, w.theta0))
    with torch.enable_grad(), held_gates(rule):
        new_theta, _ = rule.flat_step(w._replace(theta=theta, grad=grad, theta0=theta0), slots, context_N)
        copy_K, slope_K, flush_K = torch.autograd.grad(new_theta.sum(), [theta, grad, theta0], materialize_grads=True)
    return torch.stack([copy_K.mean(), (-slope_K * w.rms).mean(), flush_K.mean()])
