"""The continuous cache of Grave et al. 2016 (arXiv:1612.04426), beside static reading or beside any rule.

    p(w) = (1 − λ) p_vocab(w) + λ p_cache(w),    p_cache(w) ∝ Σ_{i: x_i = w} exp(θ_c h_t · h_i)

h are the hidden states that feed the output layer, x_i is the token that followed h_i, and i runs over the last
``window`` positions before t. Hidden states are kept as they were, whatever the weights have become since. The model
and the rule do not know of the cache: the update follows the gradient of the model's own loss, and the mixture is
worked out from its result. The cache starts empty wherever the weights start anew (``read.reset``). At a position
with nothing before it the mixture is p_vocab.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from dynlm.files import Json, read_tensors, require_layout, write_tensors
from dynlm.inner import InnerLoop, Scored
from dynlm.methods import CACHE
from dynlm.models.tap import Tap
from dynlm.settings import Count, NotNegative, Settings, Share, build
from dynlm.types import InputError


@dataclass(frozen=True)
class CacheConfig(Settings):
    """A cache's settings."""

    weight: Share = 0.1
    """λ, the share of p_cache, from 0 to below 1"""
    theta: NotNegative = 0.3
    """θ_c, sharpness a unit of h · h"""
    window: Count = 1000
    """positions looked back"""


class CacheMemory(NamedTuple):
    """What the cache remembers: hidden states and the tokens that followed them, oldest first."""

    keys_ND: Tensor
    ids_N: Tensor


class Attention(NamedTuple):
    """p_cache of S positions over the N + S positions remembered or in the segment; rows without any are zero."""

    weights_SM: Tensor
    ids_M: Tensor
    empty_S: Tensor

    def of_targets(self, targets_S: Tensor) -> Tensor:
        """p_cache(target) (S,)."""
        return (self.weights_SM * (self.ids_M == targets_S[:, None])).sum(1)

    def of_vocabulary(self, size: int) -> Tensor:
        """p_cache (S, V)."""
        probs_SV = self.weights_SM.new_zeros(self.weights_SM.shape[0], size)
        return probs_SV.scatter_add_(1, self.ids_M.expand_as(self.weights_SM), self.weights_SM)


def dots(states_SD: Tensor, memory: CacheMemory | None) -> Tensor:
    """h_t · h_i (S, N + S): of each position with those remembered and with those of its own segment."""
    keys = states_SD if memory is None else torch.cat([memory.keys_ND, states_SD])
    return states_SD @ keys.t()


def attend(dots_SM: Tensor, ids_M: Tensor, theta: float, window: int) -> Attention:
    """p_cache from the dot products; position s sees the ``window`` positions before it and no other."""
    n_queries, n_keys = dots_SM.shape
    place_M = torch.arange(n_keys, device=dots_SM.device)
    query_S = torch.arange(n_keys - n_queries, n_keys, device=dots_SM.device)[:, None]
    hidden_SM = (place_M >= query_S) | (place_M < query_S - window)
    weights_SM = (theta * dots_SM).masked_fill_(hidden_SM, -math.inf).softmax(1)
    empty_S = query_S[:, 0] == 0
    return Attention(weights_SM.masked_fill(empty_S[:, None], 0.0), ids_M, empty_S)


def look_back(
    states_SD: Tensor, targets_S: Tensor, memory: CacheMemory | None, config: CacheConfig
) -> tuple[Attention, CacheMemory]:
    """p_cache of a segment, and the memory after it."""
    keys_MD = states_SD if memory is None else torch.cat([memory.keys_ND, states_SD])
    ids_M = targets_S if memory is None else torch.cat([memory.ids_N, targets_S])
    attention = attend(dots(states_SD, memory), ids_M, config.theta, config.window)
    return attention, CacheMemory(keys_MD[-config.window :], ids_M[-config.window :])


def mix(log_vocab: Tensor, cache: Tensor, empty: Tensor, weight: float) -> Tensor:
    """log((1 − λ) p_vocab + λ p_cache), elementwise; log p_vocab where the cache is ``empty``."""
    if weight == 0:
        return log_vocab
    mixed = torch.logaddexp(log_vocab + math.log1p(-weight), (weight * cache).log().to(log_vocab.dtype))
    return torch.where(empty, log_vocab, mixed)


class CachedReader(InnerLoop):
    """A reader whose scores are the mixture's; gradients and updates are those of the model alone."""

    taps = True
    cache = CacheConfig()

    @classmethod
    def beside(cls, reader: InnerLoop, cache: CacheConfig) -> Self:
        """``reader``'s model and rule, with a cache."""
        cached = cls.of(reader)
        cached.cache = cache
        return cached

    def begin(self) -> None:
        super().begin()
        self.memory: CacheMemory | None = None

    def carried(self) -> Any:
        return super().carried(), self.memory

    def carry(self, carried: Any) -> None:
        hidden, self.memory = carried
        super().carry(hidden)

    def tapped(self, scored: Scored, tap: Tap) -> Scored:
        targets_S, size, weight = scored.targets_S, scored.targets_S.numel(), self.cache.weight
        attention, self.memory = look_back(tap.states(size), targets_S, self.memory, self.cache)

        def log_probs_SV() -> Tensor:
            log_vocab_SV = tap.logits(size).log_softmax(1)
            of_cache_SV = attention.of_vocabulary(log_vocab_SV.shape[1])
            return mix(log_vocab_SV, of_cache_SV, attention.empty_S[:, None], weight)

        log_probs_S = mix(-scored.losses_S, attention.of_targets(targets_S), attention.empty_S, weight)
        return scored._replace(losses_S=-log_probs_S, log_probs=log_probs_SV)


def save_cache(cache: CacheConfig, path: Path, made: Json) -> None:
    """Write the settings; ``made`` tells how they were found."""
    values = {name: torch.tensor(float(value), dtype=torch.float64) for name, value in asdict(cache).items()}
    write_tensors(path, values, {"kind": CACHE, "made": made})


def load_cache(path: Path) -> CacheConfig:
    """Return the counterpart of :func:`save_cache`."""
    tensors, meta = read_tensors(path)
    if meta.get("kind") != CACHE:
        raise InputError(f"{path} holds no settings of a cache: tune it again")
    number = torch.zeros((), dtype=torch.float64)
    require_layout(path, tensors, dict.fromkeys(asdict(CacheConfig()), number), advice=": tune it again")
    values = {name: tensor.item() for name, tensor in tensors.items()}
    if float(values["window"]).is_integer():
        values["window"] = int(values["window"])
    config: CacheConfig = build(CacheConfig, values, str(path))
    return config
