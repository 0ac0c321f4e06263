"""Ways to estimate the meta-gradient, behind one signature: replay, unroll, forward mode, evolution strategies.

Each reads a window of segments from a position and adds ∇φ Σ_t w_t mean(ℓ_t) to the gradients of the rule's
meta-parameters. The position it returns is detached: truncation with carry.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from dynlm.allocator import MIB
from dynlm.inner import InnerLoop, Snapshot, detach
from dynlm.meta.forward import Forward, Tangents, add_gradient
from dynlm.meta.recording import RecordConfig, Recording
from dynlm.meta.replay import Replay, ReplayConfig
from dynlm.meta.sampling import Stratum, sample_coordinates
from dynlm.meta.slices import SliceCost, choose_slices
from dynlm.meta.unroll import Unroll, UnrollConfig
from dynlm.models.params import split_like
from dynlm.optim.base import RuleState
from dynlm.optim.features import N_COL, N_ROW, N_SCALARS
from dynlm.settings import Count, Positive, Settings, Size, Whole
from dynlm.types import InputError, Piece


@dataclass(frozen=True)
class EstimatorConfig(Settings):
    """How the meta-gradient is estimated."""

    kind: Literal["replay", "unroll", "forward", "pes"] = "replay"
    """replay: exact and fast, first order; unroll: any order; forward: no truncation; pes: unbiased over windows"""
    coordinates: Whole = 40_000
    """replay and forward: weights sampled for a window (an article); 0 takes all"""
    record: RecordConfig = field(default_factory=RecordConfig)
    memory: Count = 1024
    """unroll: MiB for the graph and the positions of a window, from which slices are chosen"""
    order: Literal[1, 2] = 1
    """unroll: 2 differentiates through the gradients too"""
    slices: tuple[Count, ...] = ()
    """unroll: segments of a checkpointed slice, from the outermost level inwards; none: chosen from ``memory``"""
    pairs: Size = 2
    """pes: antithetic pairs of perturbed rules that read each article"""
    sigma: Positive = 0.03
    """pes: standard deviation of a perturbation, in units of each meta-parameter tensor's RMS (one where it is zero)"""


class Window(NamedTuple):
    """What a window of reading gave: summed nats, tokens, and the position after it."""

    nats: float
    tokens: int
    position: Any

    @classmethod
    def of(cls, losses: Sequence[Tensor], position: Any) -> Self:
        """From the losses of each segment."""
        nats = sum(float(losses_S.double().sum()) for losses_S in losses)
        return cls(nats, sum(losses_S.numel() for losses_S in losses), position)


class Estimator(abc.ABC):
    """The signature that all estimators share."""

    def __init__(self, reader: InnerLoop, config: EstimatorConfig, generator: torch.Generator | None = None) -> None:
        self.reader, self.rule, self.config = reader, reader.rule, config
        self.generator = generator or torch.Generator().manual_seed(0)

    @abc.abstractmethod
    def begin(self) -> Any:
        """Return the position at an article's start."""

    @abc.abstractmethod
    def window(self, position: Any, pieces: Sequence[Piece], weights: Sequence[float]) -> Window:
        """Read ``pieces`` from ``position``, which must not be used again, and add to φ's gradients."""

    @abc.abstractmethod
    def footprint(self, window: int) -> int:
        """Bytes that a window of so many segments keeps beside the reader: what grows with its length or with φ."""

    def seconds(self, window: int, probe: int, reading: float, estimating: float) -> float:
        """Time of a window, from the times of reading ``probe`` segments and of estimating over them."""
        return window * estimating / probe

    def note(self, window: int) -> str:
        """Return what was chosen for a window, for plans."""
        return ""

    def position_size(self) -> int:
        """Bytes of one snapshot: weights and state."""
        slots = [slot for of_tensor in self.reader.state.slots for slot in of_tensor]
        return sum(t.numel() * t.element_size() for t in (*self.reader.thetas, *slots))

    def start(self) -> Snapshot:
        """θ0, no state, no hidden state."""
        self.reader.begin()
        return self.reader.snapshot()

    def sample(self, coordinates: int) -> list[Stratum]:
        sizes = [theta.numel() for theta in self.reader.thetas]
        return sample_coordinates(sizes, coordinates, self.generator)


class ReplayEstimator(Estimator):
    """Reads with the compiled rule, records sampled gradients, replays them (dynlm.meta.replay)."""

    def __init__(self, reader: InnerLoop, config: EstimatorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(reader, config, generator)
        self.replay = Replay(self.rule, ReplayConfig(memory=config.record.memory))

    def begin(self) -> Snapshot:
        return self.start()

    def window(self, position: Snapshot, pieces: Sequence[Piece], weights: Sequence[float]) -> Window:
        reader = self.reader
        reader.resume(position)
        coordinates = affordable(self.config, len(pieces), reader)
        recording = Recording(reader, self.sample(coordinates), len(pieces), self.config.record)
        losses = []
        for piece, weight in zip(pieces, weights, strict=True):
            step = reader.segment(*piece)
            recording.add(step, reader.state.clock.step, weight)
            losses.append(step.losses_S)
        self.replay(recording)
        return Window.of(losses, reader.snapshot())

    def footprint(self, window: int) -> int:
        """Recorded gradients, what was observed, and the sampled coordinates' weights and state."""
        size = self.reader.thetas[0].element_size()
        recorded = 2 if self.config.record.dtype == "bf16" else size
        k = self._coordinates(window)
        on_disk = self.config.record.where == "disk"
        fixed = k * (16 + size * (4 + self.rule.n_slots * max(1, self.rule.slot_width)))
        return window * ((0 if on_disk else k * recorded) + size * observed_numbers(self.reader)) + fixed

    def seconds(self, window: int, probe: int, reading: float, estimating: float) -> float:
        per_coordinate = max(0.0, estimating - reading) / (probe * self._coordinates(probe))
        return window * (reading / probe + per_coordinate * self._coordinates(window))

    def note(self, window: int) -> str:
        return f"{self._coordinates(window):,} coordinates recorded"

    def _coordinates(self, window: int) -> int:
        n = sum(theta.numel() for theta in self.reader.thetas)
        return min(n, affordable(self.config, window, self.reader) or n)


def observed_numbers(reader: InnerLoop) -> int:
    """Row, column and tensor statistics that a segment leaves, at the most."""
    return sum(N_ROW * theta.shape[0] + N_COL * theta.shape[1] + N_SCALARS for theta in reader.thetas)


def affordable(config: EstimatorConfig, window: int, reader: InnerLoop) -> int:
    """Coordinates to record: those asked for (0: all), or as many as the budget holds beside what is observed.

    Raises:
        InputError: all coordinates were asked for and do not fit, or none would.
    """
    size, record = reader.thetas[0].element_size(), config.record
    each = 2 if record.dtype == "bf16" else size
    observed = size * observed_numbers(reader)
    n, budget = sum(theta.numel() for theta in reader.thetas), record.memory * MIB // max(1, window)
    fits = (budget - observed) // each
    if record.where == "disk" or (config.coordinates == 0 and n <= fits):
        return config.coordinates
    if fits < 1:
        raise InputError(
            f"{record.memory} MiB hold no coordinate over {window} segments, whose statistics take "
            f"{-(-observed * window // MIB)}: raise the memory, or shorten the truncation",
            setting="meta.estimator.record.memory",
        )
    if config.coordinates == 0:
        needed = -(-(n * each + observed) * window // MIB)
        raise InputError(
            f"recording all {n:,} weights over {window} segments takes {needed:,} MiB, the budget is {record.memory}: "
            f"sample {fits:,} coordinates, or raise the memory",
            setting="meta.estimator.record.memory",
        )
    return min(config.coordinates, fits)


class UnrollEstimator(Estimator):
    """One autograd graph a window, first or second order, in checkpointed slices (dynlm.meta.unroll)."""

    def __init__(self, reader: InnerLoop, config: EstimatorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(reader, config, generator)
        self.engines: dict[int, Unroll] = {}
        self.probe: Piece | None = None

    def begin(self) -> Snapshot:
        return self.start()

    def window(self, position: Snapshot, pieces: Sequence[Piece], weights: Sequence[float]) -> Window:
        unrolled = self.engine(pieces).run(position, pieces, weights)
        if unrolled.loss.requires_grad:
            unrolled.loss.backward(inputs=[p for p in self.rule.parameters() if p.requires_grad])
        sizes = [targets_S.numel() for _, targets_S in pieces]
        nats = sum(mean * size for mean, size in zip(unrolled.means, sizes, strict=True))
        return Window(nats, sum(sizes), detach_position(unrolled.position))

    @cached_property
    def cost(self) -> SliceCost:
        """What a position and the graph of a segment keep, measured on one segment of arbitrary text."""
        piece = self.probe
        assert piece is not None, "a window comes first"
        return self._make(()).cost(self.start(), piece)

    def footprint(self, window: int) -> int:
        return self.cost.peak(window, self._slices(window))

    def seconds(self, window: int, probe: int, reading: float, estimating: float) -> float:
        """The probe has read ``1 + its levels`` times, and gone back once, which takes about two readings."""
        passes = 3 + len(self._slices(probe))
        return window * estimating / probe * (3 + len(self._slices(window))) / passes

    def note(self, window: int) -> str:
        slices = self._slices(window)
        return f"slices of {' and '.join(map(str, slices))} segments" if slices else "the whole graph"

    def _slices(self, window: int) -> tuple[int, ...]:
        config = self.config
        return config.slices or choose_slices(window, self.cost, config.memory * MIB)

    def engine(self, pieces: Sequence[Piece]) -> Unroll:
        """Return the engine for windows of this length, in the slices asked for or in those that fit the budget."""
        window = len(pieces)
        self.probe = self.probe or pieces[0]
        if window not in self.engines:
            self.engines[window] = self._make(self._slices(window))
        return self.engines[window]

    def _make(self, slices: tuple[int, ...]) -> Unroll:
        reader, config = self.reader, UnrollConfig(self.config.order, slices)
        return Unroll(reader.score, self.rule, reader.adapted, reader.priors, config, trust=reader.config.trust)


def detach_position(position: Snapshot) -> Snapshot:
    """Cut the graph: the values go on."""
    s = position.state
    state = RuleState(detach(s.slots), s.memory, detach(s.tensors), s.clock)
    return Snapshot(detach(position.thetas), state, detach(position.hidden))


class ForwardPosition(NamedTuple):
    snapshot: Snapshot
    tangents: list[Tangents]


class ForwardEstimator(Estimator):
    """Tangents go on over windows: nothing is truncated (dynlm.meta.forward). Coordinates are drawn once an article."""

    def __init__(self, reader: InnerLoop, config: EstimatorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(reader, config, generator)
        self.forward = Forward(self.rule)

    def begin(self) -> ForwardPosition:
        start = self.start()
        tangents = self.forward.begin(start.thetas, start.state, self.sample(self.config.coordinates))
        return ForwardPosition(start, tangents)

    def window(self, position: ForwardPosition, pieces: Sequence[Piece], weights: Sequence[float]) -> Window:
        reader, tangents, losses = self.reader, position.tangents, []
        reader.resume(position.snapshot)
        for piece, weight in zip(pieces, weights, strict=True):
            step = reader.segment(*piece)
            tangents = self.forward.segment(tangents, step, reader.state.clock, reader.priors, weight)
            losses.append(step.losses_S)
        return Window.of(losses, ForwardPosition(reader.snapshot(), tangents))

    def footprint(self, window: int) -> int:
        """P tangents of every sampled weight and state, old and new: the window's length does not matter."""
        sizes = [theta.numel() for theta in self.reader.thetas]
        k = min(sum(sizes), self.config.coordinates or sum(sizes))
        states = 1 + self.rule.n_slots * max(1, self.rule.slot_width)
        return 2 * (1 + self.forward.n_phi) * k * states * self.reader.thetas[0].element_size()


class Pair(NamedTuple):
    """Two readers of the same text, whose rules are perturbed by +ε and −ε, anew in each window."""

    plus: Snapshot
    minus: Snapshot
    summed: Tensor
    """Σ ε over the windows of this article, flat over φ"""


class PESPosition(NamedTuple):
    pairs: list[Pair]
    sigma: Tensor
    """standard deviation of ε a meta-parameter, fixed for an article"""


class PESEstimator(Estimator):
    """Persistent evolution strategies (Vicol et al. 2021, arXiv:2112.13835): losses only, unbiased over all windows.

    The estimate is that of the smoothed objective E[L(φ + ε)]; each pair costs two readings of the text.
    """

    def __init__(self, reader: InnerLoop, config: EstimatorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(reader, config, generator)
        self.phi = [p for p in self.rule.parameters() if p.requires_grad and p.numel()]

    def begin(self) -> PESPosition:
        scales = [p.detach().double().square().mean().sqrt() for p in self.phi]
        sigma = torch.cat(
            [
                torch.full((p.numel(),), float(s) or 1.0, dtype=torch.float64)
                for p, s in zip(self.phi, scales, strict=True)
            ]
        )
        zero = torch.zeros_like(sigma)
        pairs = [Pair(self.start(), self.start(), zero.clone()) for _ in range(self.config.pairs)]
        return PESPosition(pairs, self.config.sigma * sigma)

    def window(self, position: PESPosition, pieces: Sequence[Piece], weights: Sequence[float]) -> Window:
        phi = torch.nn.utils.parameters_to_vector([p.detach().double() for p in self.phi])
        sigma, estimate, windows, pairs = position.sigma, torch.zeros_like(phi), [], []
        try:
            for pair in position.pairs:
                epsilon = sigma * torch.randn(sigma.shape, generator=self.generator, dtype=sigma.dtype)
                summed = pair.summed + epsilon
                plus, loss_plus = self._read(phi + epsilon, pair.plus, pieces, weights)
                minus, loss_minus = self._read(phi - epsilon, pair.minus, pieces, weights)
                estimate += summed / sigma.square() * (loss_plus - loss_minus) / 2
                windows += [plus, minus]
                pairs.append(Pair(plus.position, minus.position, summed))
        finally:
            self._set(phi)
        add_gradient(self.phi, estimate / len(pairs))
        nats = sum(w.nats for w in windows) / len(windows)
        return Window(nats, windows[0].tokens, PESPosition(pairs, sigma))

    def footprint(self, window: int) -> int:
        """Two positions a pair, old and new: the window's length does not matter."""
        return 4 * self.config.pairs * self.position_size()

    @torch.no_grad()
    def _set(self, phi: Tensor) -> None:
        for p, part in zip(self.phi, split_like(phi, self.phi), strict=True):
            p.copy_(part)

    def _read(
        self, phi: Tensor, start: Snapshot, pieces: Sequence[Piece], weights: Sequence[float]
    ) -> tuple[Window, float]:
        self._set(phi)
        self.reader.resume(start)
        losses = [self.reader.segment(*piece).losses_S for piece in pieces]
        weighted = zip(weights, losses, strict=True)
        loss = sum(weight * float(losses_S.double().sum()) / losses_S.numel() for weight, losses_S in weighted)
        return Window.of(losses, self.reader.snapshot()), loss


ESTIMATORS: dict[str, type[Estimator]] = {
    "replay": ReplayEstimator,
    "unroll": UnrollEstimator,
    "forward": ForwardEstimator,
    "pes": PESEstimator,
}


def make_estimator(reader: InnerLoop, config: EstimatorConfig, generator: torch.Generator | None = None) -> Estimator:
    """Return the estimator of a configuration, for the reader's rule."""
    return ESTIMATORS[config.kind](reader, config, generator)
