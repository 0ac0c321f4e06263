"""Settings of a cache, on the articles that hand-made rules are tuned on.

One reading pass keeps the losses and hidden states of every token; then the search reads no more. λ has a closed
condition for each (θ_c, window): the log-likelihood is concave in it. θ_c is searched on a log grid in units of
1 / mean |h|², so that the same grid serves models of every size, then between its points; then the window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynlm.evaluation.cache import CacheConfig, CacheMemory, attend, dots
from dynlm.inner import InnerLoop, Scored
from dynlm.models.tap import Tap
from dynlm.processes import spread
from dynlm.types import InputError, TokenizedArticle

SHARPNESS = tuple(2.0**k for k in range(-1, 8))
"""θ_c in units of 1 / mean |h|²"""
WINDOWS = (250, 500, 1000, 2000, 4000, 8000)
START_WINDOW = 1000
CHUNK = 256  # positions scored at once


class HiddenRecording(NamedTuple):
    """One stream as it was read, without cache."""

    losses_T: Tensor
    states_TD: Tensor
    ids_T: Tensor


class HiddenRecorder(InnerLoop):
    """Keeps losses, hidden states and tokens of what it reads."""

    taps = True

    def begin(self) -> None:
        super().begin()
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def tapped(self, scored: Scored, tap: Tap) -> Scored:
        states_SD = tap.states(scored.targets_S.numel())
        self.parts.append((scored.losses_S.float(), states_SD, scored.targets_S))
        return scored

    def recording(self) -> HiddenRecording:
        return HiddenRecording(*(torch.cat(column) for column in zip(*self.parts, strict=True)))


class TunedCache(NamedTuple):
    """The best settings; nats a token with and without the cache; ``at_bound`` names those at the edge of the grid."""

    cache: CacheConfig
    nats_per_token: float
    nats_without: float
    trials: int
    at_bound: tuple[str, ...]


def record(reader: InnerLoop, articles: Sequence[TokenizedArticle], start_id: int) -> list[HiddenRecording]:
    """Read once; one stream an article, or one of all where nothing is reset between them. Processes share streams."""
    recorder = HiddenRecorder.of(reader)
    streams = [[article] for article in articles] if reader.config.reset == "article" else [list(articles)]

    def read(number: int) -> HiddenRecording:
        for article in streams[number]:
            recorder.read(article, start_id)
        return recorder.recording()

    with recorder:
        return spread(read, [sum(map(len, stream)) for stream in streams])


def tune_cache(
    reader: InnerLoop, articles: Sequence[TokenizedArticle], start_id: int, progress: Callable[[], object] | None = None
) -> TunedCache:
    """Return (λ, θ_c, window) with the fewest nats a token of reading ``articles`` with the reader's rule.

    Ties go to the smaller window. Repeatable; no randomness.
    """
    if not articles:
        raise InputError("no article to tune a cache on: the meta split is empty", setting="data.meta_articles")
    streams = record(reader, articles, start_id)
    losses_T = torch.cat([stream.losses_T for stream in streams]).double()
    squares = torch.cat([stream.states_TD.square().sum(1) for stream in streams])
    unit = 1 / max(float(squares.mean()), 1e-30)
    tried: dict[tuple[float, int], tuple[float, float]] = {}

    def search(thetas: Sequence[float], windows: Sequence[int]) -> tuple[float, int]:
        """Try what was not yet tried; the best (sharpness, window) so far."""
        new = [pair for pair in itertools.product(thetas, windows) if pair not in tried]
        scored = cache_probabilities(streams, [(theta * unit, window) for theta, window in new])
        for pair, probs_T in zip(new, scored, strict=True):
            weight, nats = best_weight(losses_T, probs_T)
            tried[pair] = (nats, weight)
            if progress:
                progress()
        return min(tried, key=lambda pair: (tried[pair][0], pair[1]))

    sharpness, window = search(SHARPNESS, (START_WINDOW,))
    for factor in (math.sqrt(2), 2**0.25):
        sharpness, window = search((sharpness * factor, sharpness / factor), (window,))
    sharpness, window = search((sharpness,), WINDOWS)
    sharpness, window = search((sharpness * 2**0.25, sharpness / 2**0.25), (window,))
    nats, weight = tried[sharpness, window]
    at_bound = [name for name, value, grid in (("theta", sharpness, SHARPNESS), ("window", window, WINDOWS))
                if not min(grid) < value < max(grid)]  # fmt: skip
    config = CacheConfig(weight, sharpness * unit, window)
    return TunedCache(config, nats, float(losses_T.mean()), len(tried), tuple(at_bound))


def cache_probabilities(streams: Sequence[HiddenRecording], settings: Sequence[tuple[float, int]]) -> list[Tensor]:
    """p_cache(target) (T,) of all streams for each (θ_c, window); NaN where the cache is empty."""
    longest = max((window for _, window in settings), default=1)

    def of_stream(number: int) -> list[Tensor]:
        stream = streams[number]
        found: list[list[Tensor]] = [[] for _ in settings]
        for start in range(0, stream.ids_T.numel(), CHUNK):
            here, before = slice(start, start + CHUNK), slice(max(0, start - longest), start)
            memory = CacheMemory(stream.states_TD[before], stream.ids_T[before])
            dots_SM = dots(stream.states_TD[here], memory)
            ids_M = torch.cat([memory.ids_N, stream.ids_T[here]])
            for parts, (theta, window) in zip(found, settings, strict=True):
                attention = attend(dots_SM, ids_M, theta, window)
                probs_S = attention.of_targets(stream.ids_T[here])
                parts.append(probs_S.masked_fill(attention.empty_S, math.nan))
        return [torch.cat(parts) for parts in found]

    divided = spread(of_stream, [stream.ids_T.numel() for stream in streams])
    return [torch.cat(parts) for parts in zip(*divided, strict=True)]


def best_weight(losses_T: Tensor, probs_T: Tensor) -> tuple[float, float]:
    """(λ, nats a token of the mixture): the root of d/dλ Σ log(1 + λ (r − 1)), r = p_cache / p_vocab, by bisection."""
    vocab_T = (-losses_T).exp().clamp(min=1e-300)
    excess_T = (probs_T.double() / vocab_T - 1).nan_to_num(nan=0.0, posinf=1e300)

    def slope(weight: float) -> float:
        return float((excess_T / (1 + weight * excess_T)).sum())

    low, high = 0.0, 1.0 - 1e-6
    if slope(low) <= 0:
        return 0.0, float(losses_T.mean())
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low, float((losses_T - (low * excess_T).log1p()).mean())
