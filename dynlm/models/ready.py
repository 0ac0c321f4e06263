"""Base models that were trained elsewhere: any causal language model of transformers, with its own tokenizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from dynlm.data.tokenizers import HuggingFaceTokenizer, Tokenizer, TokenizerConfig
from dynlm.models.causal import CausalScorer, load_model, scorer_for
from dynlm.models.context import ContextConfig
from dynlm.models.core import LSTMScorer
from dynlm.models.lora import LoraSettings, add_lora
from dynlm.models.params import matched_parameters
from dynlm.types import InputError

EVERYTHING = ("*",)


def load_base(
    source: Path | str, lora: LoraSettings, params: tuple[str, ...], device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A model with the low-rank weights that ``lora`` asks for, and the globs of the weights that reading adapts.

    The low-rank weights are the same each time, whatever the device.

    Raises:
        InputError: no whole model, low-rank weights that it does not take, globs that match nothing or frozen weights.
    """
    model = load_model(source)
    globs = with_lora(model, lora, params)
    return cast(Any, model).to(device), globs


def with_lora(model: PreTrainedModel, lora: LoraSettings, params: tuple[str, ...]) -> tuple[str, ...]:
    """Put low-rank weights beside ``model``'s own where ``lora`` has a rank; returns the globs of what is adapted."""
    if not lora.rank:
        return params
    globs = add_lora(model, lora)
    if params == EVERYTHING:
        return globs
    frozen = next((a.name for a in matched_parameters(model, params) if not a.parameter.requires_grad), None)
    if frozen:
        raise InputError(
            f"params {params} names {frozen!r}, which is frozen beside weights of rank {lora.rank}: "
            "leave params out, or set the rank to 0",
            setting="lora.rank",
        )
    return params


def load_ready_tokenizer(source: str, config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer that belongs to a ready model: that of ``config.name``, or else of the model's own source.

    Raises:
        InputError: none there, or settings that would train another one.
    """
    if config.kind == "word":
        message = f"the tokenizer's kind is 'word', but {source} knows other tokens: leave it out, or 'huggingface'"
        raise InputError(message, setting="tokenizer.kind")
    return HuggingFaceTokenizer(config.name or source)


def require_reads(
    model: PreTrainedModel, tokenizer: Tokenizer, context: ContextConfig, segment: int
) -> LSTMScorer | CausalScorer:
    """The model's scorer, after it has scored a segment of this tokenizer's tokens, causally and to finite losses.

    Raises:
        InputError: the first of these that does not hold.
    """
    rows = cast(Any, model.get_input_embeddings()).weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} entries, {type(model).__name__} has {rows}: name the one that "
            "the model was trained with",
            setting="tokenizer.name",
        )
    ids_S = torch.arange(segment, device=model.device) % tokenizer.vocab_size
    with torch.no_grad():
        score = scorer_for(model, context)
        losses_S, _ = score(ids_S, ids_S.roll(-1), None)
    if not math.isfinite(float(losses_S.mean())):
        raise InputError(f"{type(model).__name__} gives losses that are not finite: its weights are broken")
    return score
