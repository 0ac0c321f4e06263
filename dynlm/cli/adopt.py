"""Base models that were trained elsewhere: any causal language model of transformers, taken into a run as it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from dynlm import runs
from dynlm.adapt import Scorer
from dynlm.changes import Changes, changing
from dynlm.cli.recipe import Recipe
from dynlm.data.tokenizers import HuggingFaceTokenizer, Tokenizer, TokenizerConfig
from dynlm.kept import saved_settings
from dynlm.models.causal import load_model, scorer_for
from dynlm.models.context import ContextConfig
from dynlm.models.lora import LoraSettings, add_lora
from dynlm.models.params import adapted_parameters, matched_parameters
from dynlm.stamps import Stamp, fingerprint_files
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
            f"read.params {params} names {frozen!r}, which lora.rank {lora.rank} freezes: leave read.params out, or "
            f"set lora.rank to 0"
        )
    return params


def load_ready_tokenizer(source: str, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that belongs to a ready model: that of ``config.name``, or else of the model's own source.

    Raises:
        InputError: none there, or settings that would train another one.
    """
    if config.kind == "word":
        raise InputError(f"tokenizer.kind is 'word', but {source} knows other tokens: leave it out, or 'huggingface'")
    return HuggingFaceTokenizer(config.name or source)


def require_reads(model: PreTrainedModel, tokenizer: Tokenizer, context: ContextConfig, segment: int) -> Scorer:
    """The model's scorer, after it has scored a segment of this tokenizer's tokens, causally and to finite losses.

    Raises:
        InputError: the first of these that does not hold.
    """
    rows = cast(Any, model.get_input_embeddings()).weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} entries, {type(model).__name__} has {rows}: name the one that "
            f"the model was trained with (tokenizer.name)"
        )
    ids_S = torch.arange(segment, device=model.device) % tokenizer.vocab_size
    with torch.no_grad():
        score = scorer_for(model, context)
        losses_S, _ = score(ids_S, ids_S.roll(-1), None)
    if not math.isfinite(float(losses_S.mean())):
        raise InputError(f"{type(model).__name__} gives losses that are not finite: its weights are broken")
    return score


def adopt(recipe: Recipe, run: runs.Run, data: str) -> None:
    """Make ``run`` from a ready model and its tokenizer, untrained; nothing is written unless all of it reads.

    ``data``: the fingerprint of the corpus.
    """
    source = recipe.model.pretrained
    model = load_model(source)
    tokenizer = load_ready_tokenizer(source, recipe.tokenizer)
    require_reads(model, tokenizer, recipe.context, recipe.read.segment)
    with changing(run.path) as new:
        begin_run(new, run, tokenizer)
        new.remove(run.checkpoint("train"), run.retraining.path)
        model.save_pretrained(new.at(run.model))  # without low-rank weights, which each stage makes from their seed
        globs = with_lora(model, recipe.lora, recipe.read.params)
        adapted = sum(a.parameter.numel() for a in adapted_parameters(model, globs))
        write_recipe(new, run, recipe, data, finished=True)
    total = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}: {total:,} weights, {adapted:,} adapted ({adapted / total:.2%})")


def begin_run(new: Changes, run: runs.Run, tokenizer: Tokenizer, demo: bool = False) -> None:
    """Put a tokenizer in the place of an earlier run's, and remove what was made from that.

    ``demo``: the demo makes this run, and may replace it.
    """
    new.remove(*run.derived())
    if demo:
        runs.write_text(new.at(run.demo), "`dynlm demo` made this run, and replaces it when it is run again\n")
    tokenizer.save(new.at(run.tokenizer))


def write_recipe(new: Changes, run: runs.Run, recipe: Recipe, data: str, *, finished: bool) -> None:
    """Write recipe.json for the tokenizer and the base model, each as it will stand when the changes are made."""
    prints = {"data": data}
    for name, folder in (("tokenizer", run.tokenizer), ("model", run.model)):
        prints[name] = fingerprint_files(new.coming(folder))
    runs.write_json(new.at(run.recipe), Stamp(finished, prints).put_on(saved_settings(recipe)))
