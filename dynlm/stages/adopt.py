"""Base models that were trained elsewhere, taken into a run as they are, and what begins any run."""

from __future__ import annotations

from dynlm.changes import Changes, changing
from dynlm.data.tokenizers import Tokenizer
from dynlm.files import write_json, write_text
from dynlm.kept import saved_settings
from dynlm.models.causal import load_model
from dynlm.models.params import adapted_parameters
from dynlm.models.ready import load_ready_tokenizer, require_reads, with_lora
from dynlm.provenance import record
from dynlm.runs import Run
from dynlm.stages.recipe import Recipe
from dynlm.stamps import Stamp, fingerprint_files


def adopt(recipe: Recipe, run: Run, data: str) -> None:
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
        tokenizer.pretrained().save_pretrained(new.at(run.model))
        globs = with_lora(model, recipe.lora, recipe.read.params)
        adapted = sum(a.parameter.numel() for a in adapted_parameters(model, globs))
        write_recipe(new, run, recipe, data, finished=True)
    total = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}: {total:,} weights, {adapted:,} adapted ({adapted / total:.2%})")


def begin_run(new: Changes, run: Run, tokenizer: Tokenizer, demo: bool = False) -> None:
    """Put a tokenizer in the place of an earlier run's, and remove what was made from that.

    ``demo``: the demo makes this run, and may replace it.
    """
    new.remove(*run.derived())
    if demo:
        write_text(new.at(run.demo), "`dynlm demo` made this run, and replaces it when it is run again\n")
    tokenizer.save(new.at(run.tokenizer))


def write_recipe(new: Changes, run: Run, recipe: Recipe, data: str, *, finished: bool) -> None:
    """Write recipe.json for the tokenizer and the base model, each as it will stand when the changes are made, and what
    made them."""
    prints = {"data": data}
    for name, folder in (("tokenizer", run.tokenizer), ("model", run.model)):
        prints[name] = fingerprint_files(new.coming(folder))
    write_json(new.at(run.recipe), Stamp(finished, prints).put_on(saved_settings(recipe)))
    record(new, run, run.tokenizer, run.model)
