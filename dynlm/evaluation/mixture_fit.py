"""The network of a mixture, fitted on the articles that hand-made rules are tuned on.

One reading pass keeps what every source gives each target and what was known before it; the fit reads no more. It
starts at the best constant weights, found by expectation maximisation, and follows Adam on the mean loss of three
quarters of the articles; the state with the lowest loss on the last quarter is kept, so that a network that does not
pay is the constant mixture.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynlm.evaluation.mixture import MixedReader, Mixture, Sources
from dynlm.inner import Scored
from dynlm.processes import spread
from dynlm.types import InputError, TokenizedArticle

EPOCHS = 40
BATCH = 1024
LR = 1e-2
WEIGHT_DECAY = 1e-3
EM_STEPS = 50


class SourceRecorder(MixedReader):
    """Keeps the sources of what it reads; scores are those of the adapted weights alone."""

    def begin(self) -> None:
        super().begin()
        self.parts: list[Sources] = []

    def kept(self, scored: Scored, sources: Sources) -> Scored:
        self.parts.append(sources)
        return scored


class FittedMixture(NamedTuple):
    """A mixture and what it is worth, in nats per token of the articles that it was not fitted on."""

    mixture: Mixture
    nats_per_token: float
    constant: float
    """of the best constant weights"""
    weights: list[float]
    """these, of static, adapted and cache, as far as there are"""
    passes: int
    """over the recorded tokens, to the state that is kept"""


def fit_mixture(
    recorder: SourceRecorder,
    articles: Sequence[TokenizedArticle],
    start_id: int,
    *,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> FittedMixture:
    """Read ``articles`` with ``recorder``'s rule and cache, and fit a mixture of what they predict.

    Repeatable for a seed on one machine.

    Raises:
        InputError: fewer than four articles, the least that can be divided.
    """
    if len(articles) < 4:
        raise InputError(f"a mixture is fitted on {len(articles)} articles: give at least 4", setting="tune.articles")
    recorded = record(recorder, articles, start_id)
    n_fit = len(recorded) - len(recorded) // 4
    fit, held = join(recorded[:n_fit]), join(recorded[n_fit:])
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        return _fit(fit, held, progress)
    finally:
        torch.set_rng_state(torch_state)


def record(recorder: SourceRecorder, articles: Sequence[TokenizedArticle], start_id: int) -> list[Sources]:
    """Return the sources of each article; several processes share them."""

    def read(number: int) -> Sources:
        recorder.parts = []
        recorder.read(articles[number], start_id)
        return join(recorder.parts)

    with recorder:
        return spread(read, list(map(len, articles)), divided=recorder.config.reset == "article")


def join(parts: Sequence[Sources]) -> Sources:
    return Sources(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _fit(fit: Sources, held: Sources, progress: Callable[[], object] | None) -> FittedMixture:
    mixture = Mixture(fit.log_probs_SK.shape[1], fit.features_SF.shape[1])
    weights_K = constant_weights(fit)
    with torch.no_grad():
        mixture.mean.copy_(fit.features_SF.mean(0))
        mixture.std.copy_(fit.features_SF.std(0).clamp(min=1e-3))
        mixture.out.bias.copy_(weights_K.clamp(min=1e-4).log())
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    constant = best = loss_of(mixture, held)
    kept, kept_epoch = copy.deepcopy(mixture), 0
    size = len(fit.log_probs_SK)
    for epoch in range(1, EPOCHS + 1):
        optimizer.param_groups[0]["lr"] = LR * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / EPOCHS))
        for index_B in torch.randperm(size).split(BATCH):
            optimizer.zero_grad()
            loss = -mixture.mix(Sources(*(column[index_B] for column in fit))).mean()
            loss.backward()
            optimizer.step()
        if (found := loss_of(mixture, held)) < best:
            best, kept, kept_epoch = found, copy.deepcopy(mixture), epoch
        if progress:
            progress()
    return FittedMixture(kept.eval().requires_grad_(False), best, constant, weights_K.tolist(), kept_epoch)


@torch.no_grad()
def loss_of(mixture: Mixture, sources: Sources) -> float:
    """Nats per token."""
    return -float(mixture.mix(sources).double().mean())


def constant_weights(sources: Sources) -> Tensor:
    """(K,): the best weights that are the same for every token, by expectation maximisation; empty sources get none."""
    log_probs_SK = sources.log_probs_SK.double().masked_fill(sources.empty_SK, -math.inf)
    weights_K = torch.full((log_probs_SK.shape[1],), 1 / log_probs_SK.shape[1], dtype=torch.float64)
    for _ in range(EM_STEPS):
        weights_K = (weights_K.log() + log_probs_SK).softmax(1).mean(0)
    return weights_K.float()
