"""A mixture of memories: static, adapted and cache predictions, weighted token by token by a small learned network.

    p(w) = Σ_k π_k(x) p_k(w),    π = softmax(network(x))

The sources k are the trained weights θ0, the adapted weights and the cache (dynlm.evaluation.cache), as far as a method
has them. x is known before the token: how sure each source is, what they give each other's first choice, which of them
has done better on the tokens before, and the position. The mixture reads out what the memories predict: model, rule and
cache do not know of it, and updates follow the gradient of the model's own loss. It costs a second forward pass, with
θ0. Its network is fitted on the articles that rules are tuned on (dynlm.evaluation.mixture_fit).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from dynlm.evaluation.cache import Attention, CacheConfig, CacheMemory, look_back
from dynlm.files import Json, read_tensors, require_layout, write_tensors
from dynlm.inner import InnerLoop, Scored, Scorer, detach
from dynlm.methods import MIX
from dynlm.models.tap import Tap
from dynlm.types import InputError

HIDDEN = 16
"""units of the network"""
DECAYS = (0.9, 0.98)
"""of the running means of what one source has gained over another"""
LARGEST = 3.0
"""nats that one token may add to them"""
LEAST = 1e-6
"""probability below which p_cache counts as this much in features"""
PAIR, CACHED = 6, 3
"""features of static beside adapted, and of a cache beside them, without the running means"""


class Sources(NamedTuple):
    """What the memories say of a segment's S tokens, and what is known before each of them."""

    log_probs_SK: Tensor
    """of the targets; −∞ where a cache has not seen the token"""
    features_SF: Tensor
    empty_SK: Tensor
    """True where a source says nothing: a cache before the first token"""


class Mixture(nn.Module):
    """π(x): features, standardised, through one hidden layer.

    Args:
        n_sources: K, the memories that are mixed.
        n_features: F, as :func:`count_features` counts them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, n_sources: int, n_features: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(n_features, HIDDEN), nn.Linear(HIDDEN, n_sources)
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))
        nn.init.zeros_(self.out.weight)

    def forward(self, sources: Sources) -> Tensor:
        """Return log π (S, K)."""
        x_SF = (sources.features_SF - self.mean) / self.std
        logits_SK = self.out(torch.tanh(self.hidden(x_SF)))
        found: Tensor = logits_SK.masked_fill(sources.empty_SK, -math.inf).log_softmax(1)
        return found

    def mix(self, sources: Sources) -> Tensor:
        """Return log p of the targets (S,)."""
        log_weights_SK: Tensor = self(sources)
        return (log_weights_SK + sources.log_probs_SK).logsumexp(1)


def count_features(learns: bool, cached: bool) -> int:
    """F: of both weights where the rule learns, or else of one, of a cache, the running means, the position."""
    return (PAIR if learns else 2) + cached * CACHED + len(DECAYS) * (learns + cached) + 1


class Evidence(NamedTuple):
    """What has been seen so far: running means (D, E) of gains between sources, and the number of tokens."""

    means_DE: Tensor
    tokens: int


class MixedReader(InnerLoop):
    """A reader whose scores are the mixture's; gradients and updates are those of the model alone."""

    taps = True
    cache: CacheConfig | None = None
    mixture: Mixture | None = None
    still: nn.Module | None = None
    """a copy of the model that keeps θ0; None where the rule learns nothing, so that there is but one prediction"""
    still_score: Scorer

    @classmethod
    def over(cls, reader: InnerLoop, scorer: Callable[[Any], Scorer], cache: CacheConfig | None) -> Self:
        """``reader``'s model and rule, with a cache or without; ``scorer`` makes a scorer of a copy of the model.

        Raises:
            InputError: a rule that learns nothing, without a cache: one prediction is nothing to mix.
        """
        if cache is None and not reader.rule.reads_gradient:
            raise InputError(f"rule {reader.rule.name!r} without a cache makes one prediction: there is nothing to mix")
        mixed = cls.of(reader)
        mixed.cache = cache
        if reader.rule.reads_gradient:
            mixed.still = copy.deepcopy(reader.model).eval().requires_grad_(False)
            mixed.still_score = scorer(mixed.still)
        return mixed

    def begin(self) -> None:
        super().begin()
        pairs = (self.still is not None) + (self.cache is not None)
        self.still_hidden: Any = None
        self.memory: CacheMemory | None = None
        self.evidence = Evidence(torch.zeros(len(DECAYS), pairs, device=self.thetas[0].device), 0)

    def carried(self) -> Any:
        return super().carried(), self.still_hidden, self.memory, self.evidence

    def carry(self, carried: Any) -> None:
        hidden, self.still_hidden, self.memory, self.evidence = carried
        super().carry(hidden)

    def tapped(self, scored: Scored, tap: Tap) -> Scored:
        targets_S, size, attention = scored.targets_S, scored.targets_S.numel(), None
        log_adapted_SV, log_static_SV = tap.logits(size).log_softmax(1), self._static(scored.inputs_S, targets_S)
        if self.cache is not None:
            attention, self.memory = look_back(tap.states(size), targets_S, self.memory, self.cache)
        sources = self._sources(log_static_SV, log_adapted_SV, attention, targets_S)
        if self.mixture is None:
            return self.kept(scored, sources)
        log_weights_SK: Tensor = self.mixture(sources)

        def log_probs_SV() -> Tensor:
            rows = [log_adapted_SV] if log_static_SV is None else [log_static_SV, log_adapted_SV]
            if attention is not None:
                rows.append(attention.of_vocabulary(log_adapted_SV.shape[1]).log())
            return (log_weights_SK[:, :, None] + torch.stack(rows, 1)).logsumexp(1)

        losses_S = -(log_weights_SK + sources.log_probs_SK).logsumexp(1)
        return scored._replace(losses_S=losses_S, log_probs=log_probs_SV)

    def kept(self, scored: Scored, sources: Sources) -> Scored:
        """Return what becomes of a segment's scores without a mixture."""
        raise InputError("a mixture reads with a fitted network: fit one with dynlm.evaluation.mixture_fit")

    def _static(self, inputs_S: Tensor, targets_S: Tensor) -> Tensor | None:
        """(S, V) log-probabilities under θ0, which carries a hidden state of its own."""
        if self.still is None:
            return None
        with Tap(self.still) as tap:
            _, hidden = self.still_score(inputs_S, targets_S, self.still_hidden)
        self.still_hidden = detach(hidden)
        return tap.logits(targets_S.numel()).log_softmax(1)

    def _sources(
        self, log_static_SV: Tensor | None, log_adapted_SV: Tensor, attention: Attention | None, targets_S: Tensor
    ) -> Sources:
        """Return what the mixture is made of, and take the segment into the evidence for the next one."""
        size, target_S1 = targets_S.numel(), targets_S[:, None]
        sure, gains, found = [sureness(log_adapted_SV)], [], []
        adapted_S = log_adapted_SV.gather(1, target_S1)[:, 0]
        if log_static_SV is not None:
            static_S = log_static_SV.gather(1, target_S1)[:, 0]
            found.append(static_S)
            gains.append(adapted_S - static_S)
            sure += [sureness(log_static_SV), first_choices(log_static_SV, log_adapted_SV)]
        found.append(adapted_S)
        if attention is not None:
            cache_S = attention.of_targets(targets_S)
            found.append(cache_S.log())
            gains.append(cache_S.clamp(min=LEAST).log() - adapted_S)
            sure.append(cache_features(attention, log_adapted_SV))
        place_S = torch.arange(size, device=targets_S.device) + self.evidence.tokens
        means_SDE, self.evidence = running(self.evidence, torch.stack(gains, 1).clamp(-LARGEST, LARGEST))
        features_SF = torch.cat([*sure, means_SDE.flatten(1), place_S.float().log1p()[:, None]], 1)
        empty_SK = torch.zeros(size, len(found), dtype=torch.bool, device=targets_S.device)
        if attention is not None:
            empty_SK[:, -1] = attention.empty_S
        return Sources(torch.stack(found, 1), features_SF.float(), empty_SK)


def sureness(log_probs_SV: Tensor) -> Tensor:
    """(S, 2): entropy and log-probability of the first choice."""
    entropy_S = -(log_probs_SV.exp() * log_probs_SV).sum(1)
    return torch.stack([entropy_S, log_probs_SV.amax(1)], 1)


def first_choices(log_static_SV: Tensor, log_adapted_SV: Tensor) -> Tensor:
    """(S, 2): what each gives the other's first choice."""
    of_static_S = log_adapted_SV.gather(1, log_static_SV.argmax(1, keepdim=True))[:, 0]
    of_adapted_S = log_static_SV.gather(1, log_adapted_SV.argmax(1, keepdim=True))[:, 0]
    return torch.stack([of_static_S, of_adapted_S], 1)


def cache_features(attention: Attention, log_adapted_SV: Tensor) -> Tensor:
    """(S, 3): logs of p_cache of its first choice and of adapted's, and what adapted gives the cache's."""
    cache_SV = attention.of_vocabulary(log_adapted_SV.shape[1])
    most_S, choice_S = cache_SV.max(1)
    of_adapted_S = cache_SV.gather(1, log_adapted_SV.argmax(1, keepdim=True))[:, 0]
    given_S = log_adapted_SV.gather(1, choice_S[:, None])[:, 0]
    return torch.stack([most_S.clamp(min=LEAST).log(), of_adapted_S.clamp(min=LEAST).log(), given_S], 1)


def running(evidence: Evidence, gains_SE: Tensor) -> tuple[Tensor, Evidence]:
    """Running means before each of S tokens (S, D, E), and those after the last one.

    m_{s+1} = γ m_s + (1 − γ) gain_s, so a token's own gain is in no mean before it.
    """
    size, means = gains_SE.shape[0], []
    back_SS = torch.arange(size, device=gains_SE.device)[:, None] - torch.arange(size, device=gains_SE.device) - 1
    for decay, mean_E in zip(DECAYS, evidence.means_DE, strict=True):
        power_SS = torch.where(back_SS >= 0, decay ** back_SS.clamp(min=0), 0.0) * (1 - decay)
        start_S = decay ** torch.arange(size, device=gains_SE.device)
        means.append(start_S[:, None] * mean_E + power_SS @ gains_SE.float())
    means_SDE = torch.stack(means, 1)
    decays_D1 = torch.tensor(DECAYS, device=gains_SE.device)[:, None]
    after_DE = decays_D1 * means_SDE[-1] + (1 - decays_D1) * gains_SE[-1].float()
    return means_SDE, Evidence(after_DE, evidence.tokens + size)


def save_mixture(mixture: Mixture, path: Path, made: Json) -> None:
    """Write the network; ``made`` tells how it was fitted."""
    write_tensors(path, mixture.state_dict(), {"kind": MIX, "made": made})


def load_mixture(path: Path, learns: bool, cached: bool) -> Mixture:
    """Return the counterpart of :func:`save_mixture`, for a rule that learns or not, with a cache or without.

    Raises:
        InputError: a file of another kind, or one that was fitted for another kind of method.
    """
    tensors, meta = read_tensors(path)
    if meta.get("kind") != MIX:
        raise InputError(f"{path} holds no mixture: fit it again with `dynlm tune`")
    mixture = Mixture(1 + learns + cached, count_features(learns, cached))
    require_layout(path, tensors, mixture.state_dict(), advice=": fit it again with `dynlm tune`")
    mixture.load_state_dict(tensors)
    return mixture.eval().requires_grad_(False)
