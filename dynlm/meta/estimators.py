"""Ways to estimate the meta-gradient, behind one signature: replay, unroll, forward mode, evolution strategies.

Each reads a window of segments from a position and adds ∇φ Σ_t w_t mean(ℓ_t) to the gradients of the rule's
meta-parameters. The position it returns is detached: truncation with carry.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dynlm.adapt import Reader, Snapshot, detach
from dynlm.meta.forward import Forward, Tangents
from dynlm.meta.recording import RecordConfig, Recording
from dynlm.meta.replay import MIB, Replay, ReplayConfig
from dynlm.meta.sampling import Stratum, sample_coordinates
from dynlm.meta.unroll import Piece, Unroll, UnrollConfig
from dynlm.optim.base import RuleState
from dynlm.types import InputError


@dataclass(frozen=True)
class EstimatorConfig:
    """How the meta-gradient is estimated."""

    kind: Literal["replay", "unroll", "forward", "pes"] = "replay"
    """replay: exact and fast, first order; unroll: any order; forward: no truncation; pes: unbiased over windows"""
    coordinates: int = 200_000
    """replay and forward: weights sampled for a window (an article); 0 takes all"""
    memory: int = 1024
    """MiB for recorded gradients: long windows get fewer coordinates; and for a block of the replay"""
    record: RecordConfig = field(default_factory=RecordConfig)
    order: Literal[1, 2] = 1
    """unroll: 2 differentiates through the gradients too"""
    slices: tuple[int, ...] = ()
    """unroll: segments of a checkpointed slice, from the outermost level inwards; none: chosen from ``memory``"""
    pairs: int = 2
    """pes: antithetic pairs of perturbed rules that read each article"""
    sigma: float = 0.03
    """pes: standard deviation of a perturbation, in units of each meta-parameter tensor's RMS (one where it is zero)"""


class Window(NamedTuple):
    """What a window of reading gave: summed nats, tokens, and the position after it."""

    nats: float
    tokens: int
    position: Any


class Estimator(abc.ABC):
    """The signature that all estimators share."""

    def __init__(self, reader: Reader, config: EstimatorConfig, generator: torch.Generator | None = None) -> None:
        self.reader, self.rule, self.config = reader, reader.rule, config
        self.generator = generator or torch.Generator().manual_seed(0)

    @abc.abstractmethod
    def begin(self) -> Any:
        """The position at an article's start."""

    @abc.abstractmethod
    def window(self, position: Any, pieces: Sequence[Piece], weights: Sequence[float]) -> Window:
        """Read ``pieces`` from ``position``, which must not be used again, and add the meta-gradient to φ's gradients."""

    def start(self) -> Snapshot:
        """θ0, no state, no hidden state."""
        self.reader.begin()
        return self.reader.snapshot()

    def sample(self, coordinates: int) -> list[Stratum]:
        sizes = [theta.numel() for theta in self.reader.thetas]
        return sample_coordinates(sizes, coordinates, self.generator)


class ReplayEstimator(Estimator):
    """Reads with the compiled rule, records sampled gradients, replays them (dynlm.meta.replay)."""

    def __init__(self, reader: Reader, config: EstimatorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(reader, config, generator)
        self.replay = Replay(self.rule, ReplayConfig(memory=config.memory))

    def begin(self) -> Snapshot:
        return self.start()

    def window(self, position: Snapshot, pieces: Sequence[Piece], weights: Sequence[float]) -> Window:
        reader = self.reader
        reader.resume(position)
        coordinates = affordable(self.config, len(pieces), reader)
        recording = Recording(reader, self.sample(coordinates), len(pieces), self.config.record)
        nats, tokens = 0.0, 0
        for piece, weight in zip(pieces, weights, strict=True):
            step = reader.segment(*piece)
            recording.add(step, reader.state.clock, weight)
            nats, tokens = nats + float(step.losses_S.double().sum()), tokens + step.losses_S.numel()
        self.replay(recording)
        return Window(nats, tokens, reader.snapshot())


def affordable(config: EstimatorConfig, window: int, reader: Reader) -> int:
    """Coordinates to record: those asked for (0: all), or as many as the budget holds over this window.

    Raises:
        InputError: all coordinates were asked for and do not fit.
    """
    size = 2 if config.record.dtype == "bf16" else reader.thetas[0].element_size()
    n, fits = sum(theta.numel() for theta in reader.thetas), config.memory * MIB // (size * max(1, window))
    if config.coordinates == 0 and fits < n:
        needed = -(-n * size * window // MIB)
        raise InputError(
            f"recording all {n:,} weights over {window} segments takes {needed:,} MiB, the budget is {config.memory}: "
            f"sample {fits:,} coordinates, or cut windows to {max(2, config.memory * MIB // (size * n))} segments"
        )
    return 0 if config.coordinates == 0 else min(config.coordinates, fits)


class UnrollEstimator(Estimator):
    """One autograd graph a window, first or second order, in checkpointed slices (dynlm.meta.unroll)."""

    def __init__(self, reader: Reader, config: EstimatorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(reader, config, generator)
        engine = UnrollConfig(config.order, config.slices)
        self.unroll = Unroll(reader.score, self.rule, reader.adapted, reader.priors, engine)

    def begin(self) -> Snapshot:
        return self.start()

    def window(self, position: Snapshot, pieces: Sequence[Piece], weights: Sequence[float]) -> Window:
        unrolled = self.unroll.run(position, pieces, weights)
        if unrolled.loss.requires_grad:
            phi = [p for p in self.rule.parameters() if p.requires_grad]
            for p, grad in zip(phi, torch.autograd.grad(unrolled.loss, phi, allow_unused=True), strict=True):
                if grad is not None:
                    p.grad = grad if p.grad is None else p.grad + grad
        sizes = [targets_S.numel() for _, targets_S in pieces]
        nats = sum(mean * size for mean, size in zip(unrolled.means, sizes, strict=True))
        return Window(nats, sum(sizes), detach_position(unrolled.position))


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

    def __init__(self, reader: Reader, config: EstimatorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(reader, config, generator)
        self.forward = Forward(self.rule)

    def begin(self) -> ForwardPosition:
        start = self.start()
        tangents = self.forward.begin(start.thetas, start.state, self.sample(self.config.coordinates))
        return ForwardPosition(start, tangents)

    def window(self, position: ForwardPosition, pieces: Sequence[Piece], weights: Sequence[float]) -> Window:
        reader, tangents = self.reader, position.tangents
        reader.resume(position.snapshot)
        nats, tokens = 0.0, 0
        for piece, weight in zip(pieces, weights, strict=True):
            step = reader.segment(*piece)
            tangents = self.forward.segment(tangents, step, reader.state.clock, reader.priors, weight)
            nats, tokens = nats + float(step.losses_S.double().sum()), tokens + step.losses_S.numel()
        return Window(nats, tokens, ForwardPosition(reader.snapshot(), tangents))


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

    def __init__(self, reader: Reader, config: EstimatorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(reader, config, generator)
        self.phi = [p for p in self.rule.parameters() if p.requires_grad and p.numel()]

    def begin(self) -> PESPosition:
        scales = [p.detach().double().square().mean().sqrt() for p in self.phi]
        sigma = torch.cat(
            [torch.full((p.numel(),), float(s) or 1.0, dtype=torch.float64) for p, s in zip(self.phi, scales, strict=True)]
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
        for p, part in zip(self.phi, (estimate / len(pairs)).split([p.numel() for p in self.phi]), strict=True):
            of_p = part.view(p.shape).to(p)
            p.grad = of_p if p.grad is None else p.grad + of_p
        nats = sum(w.nats for w in windows) / len(windows)
        return Window(nats, windows[0].tokens, PESPosition(pairs, sigma))

    @torch.no_grad()
    def _set(self, phi: Tensor) -> None:
        for p, part in zip(self.phi, phi.split([p.numel() for p in self.phi]), strict=True):
            p.copy_(part.view(p.shape))

    def _read(
        self, phi: Tensor, start: Snapshot, pieces: Sequence[Piece], weights: Sequence[float]
    ) -> tuple[Window, float]:
        self._set(phi)
        self.reader.resume(start)
        loss, nats, tokens = 0.0, 0.0, 0
        for piece, weight in zip(pieces, weights, strict=True):
            losses_S = self.reader.segment(*piece).losses_S
            total = float(losses_S.double().sum())
            loss, nats, tokens = loss + weight * total / losses_S.numel(), nats + total, tokens + losses_S.numel()
        return Window(nats, tokens, self.reader.snapshot()), loss


ESTIMATORS: dict[str, type[Estimator]] = {
    "replay": ReplayEstimator,
    "unroll": UnrollEstimator,
    "forward": ForwardEstimator,
    "pes": PESEstimator,
}


def make_estimator(reader: Reader, config: EstimatorConfig, generator: torch.Generator | None = None) -> Estimator:
    """The estimator of a configuration, for the reader's rule."""
    return ESTIMATORS[config.kind](reader, config, generator)
