"""What a transformers language model remembers of an article between two segments: how much text, and its cache.

Between segments a cache is nested tuples of names, numbers and tensors, which every other part of dynlm can detach,
copy and write to a checkpoint; inside a call it is the ``DynamicCache`` that transformers works on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from dynlm.settings import Settings, Whole
from dynlm.types import InputError

POSITION_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
LONGEST_WINDOW, RECURRENT_WINDOW = 1024, 256
RECURRENT_STATES = ("conv_states", "recurrent_states")  # of a layer: a tensor each, or several by number

FrozenCache = tuple[tuple[tuple[str, Any], ...], ...]
"""per layer, (attribute, value): a tensor, a number, None, or a tuple of these"""


@dataclass(frozen=True)
class ContextConfig(Settings):
    """What a transformers language model sees of the article before a segment; an LSTM carries its own state."""

    carry: Literal["overlap", "cache", "none"] = "cache"
    """cache: keys and values, or recurrent states, as earlier weights left them; overlap: the tokens before it, read
    again under the present weights, which takes many times longer; none: the segment alone"""
    window: Whole = 0
    """most tokens seen at once, the segment's own among them; 0: the model's positions, at most 1024, or 256 where it
    has none; a recurrent model's cache sees the whole article whatever the window"""

    def tokens(self, model: PreTrainedModel) -> int:
        """Return the window for this model.

        Raises:
            InputError: a window shorter than 2 or longer than the model's positions.
        """
        most = positions(model)
        if self.window != 0 and self.window < 2:
            message = f"window is {self.window}: expected 2 or more tokens, or 0 for the model's own"
            raise InputError(message, setting="context.window")
        if most is not None and self.window > most:
            raise InputError(
                f"window is {self.window}, but {type(model).__name__} has {most} positions: lower it to {most} or less",
                setting="context.window",
            )
        return self.window or (RECURRENT_WINDOW if most is None else min(most, LONGEST_WINDOW))


def positions(model: PreTrainedModel) -> int | None:
    """The longest text in tokens that a model is made for; None where nothing bounds it, as in recurrent models."""
    config = model.config.get_text_config(decoder=True)
    found = [getattr(config, name, None) for name in POSITION_NAMES]
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def freeze(cache: Any) -> FrozenCache:
    """Return a cache as nested tuples, detached. Private attributes follow from the model's config and stay out."""
    return tuple(
        tuple((name, _freeze(value)) for name, value in vars(layer).items() if _is_state(name, value))
        for layer in cache.layers
    )


def _is_state(name: str, value: Any) -> bool:
    return not name.startswith("_") and (value is None or isinstance(value, Tensor | int | dict))


def _freeze(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().contiguous()
    return tuple(_freeze(v) for v in value.values()) if isinstance(value, dict) else value


def thaw(frozen: FrozenCache | None, model: PreTrainedModel) -> DynamicCache:
    """Return the cache again, an empty one for None. It shares no tensor that a model updates in place."""
    cache = DynamicCache(config=model.config)
    layers: list[Any] = cache.layers
    for layer, values in zip(layers, frozen or (), strict=frozen is not None):
        for name, value in values:
            setattr(layer, name, _thaw(value, name in RECURRENT_STATES))
            first = next((v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Tensor)), None)
            if first is not None:
                layer.dtype, layer.device = first.dtype, first.device
    return cache


def _thaw(value: Any, updated_in_place: bool) -> Any:
    if isinstance(value, tuple):
        return {i: _thaw(v, updated_in_place) for i, v in enumerate(value)}
    return value.clone() if updated_in_place and isinstance(value, Tensor) else value


def recurrent_states(cache: Any) -> list[Tensor]:
    """Return the tensors of a cache that a model updates in place; none in a pure attention model."""
    states = [getattr(layer, name, None) for layer in cache.layers for name in RECURRENT_STATES]
    several = [list(state.values()) if isinstance(state, dict) else [state] for state in states]
    return [tensor for tensors in several for tensor in tensors if isinstance(tensor, Tensor)]


def is_recurrent(cache: Any) -> bool:
    """Some layer carries a state instead of, or beside, keys and values."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def grows(cache: Any) -> bool:
    """Some layer keeps keys and values, which have positions and grow with the text."""
    return any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


@contextmanager
def kept_when_updated(tensors: list[Tensor]) -> Iterator[None]:
    """Inside, the graph keeps copies of ``tensors`` as they were: a later update in place does not touch them."""
    ours = {t.untyped_storage().data_ptr() for t in tensors}

    def pack(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage().data_ptr() in ours else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
