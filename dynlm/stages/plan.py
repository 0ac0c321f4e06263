"""The stage ``plan``: what meta-training will take in memory and time, predicted on random text.

The model is a fresh one of the recipe's sizes, or ``model.pretrained``, read behind as much text as it sees at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynlm.allocator import MIB
from dynlm.data.segments import article_segments
from dynlm.files import Json
from dynlm.inner import InnerLoop, Scorer, detach
from dynlm.meta.estimators import make_estimator
from dynlm.meta.plan import PROBE, available_memory, peak_memory, plan_step, require_fit
from dynlm.models.causal import CausalScorer, scorer_for
from dynlm.models.core import LSTMScorer
from dynlm.models.ready import load_base
from dynlm.optim.library import start_rule
from dynlm.priors import measure_priors
from dynlm.runs import Run
from dynlm.stages.recipe import Recipe, recipe_of_run

START = {"lr": 2e-3, "eps": 5e-4, "decay": 1e-3}  # any settings: they move no cost


class InMidText:
    """Scores with a model whose text begins behind text already, random and as long as it sees at once.

    What a segment costs grows with the text before it, up to there; a plan is for the long articles.
    """

    def __init__(self, score: CausalScorer, segment: int, vocab_size: int) -> None:
        self.score = score
        self.before: Any = None
        n = score.window - (PROBE * segment if score.config.carry == "cache" else 0)  # a full cache is read anew
        if score.config.carry != "none" and n > 1:
            ids_T = _random_ids(n, vocab_size, score.model.device)
            with torch.no_grad():
                self.before = detach(score(ids_T, ids_T, None)[1])

    def __call__(self, inputs_S: Tensor, targets_S: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        return self.score(inputs_S, targets_S, self.before if hidden is None else hidden)


def plan(recipe: Recipe) -> Json:
    """Needs no data and writes nothing. Exit code 2, with what would fit, where memory is too small."""
    meta, segment = recipe.meta, recipe.read.segment
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, score, params = _base(recipe, device)
    vocab_size = cast(Any, model).get_input_embeddings().weight.shape[0]
    pieces = list(article_segments(_random_ids(8 * segment, vocab_size, device), 0, segment))
    priors = measure_priors(model, score, iter(pieces[:2]), params)
    rule = start_rule(meta.rule, START, priors, meta.seed, meta.hidden).to(device)
    reader = InnerLoop(model, score, rule, priors, replace(recipe.read, params=params))
    estimator = make_estimator(reader, meta.estimator)
    step = plan_step(estimator, pieces, meta.truncation, meta.articles)
    limit = recipe.plan.memory * MIB or available_memory() + peak_memory()
    weights, phi = sum(t.numel() for t in reader.thetas), sum(p.numel() for p in rule.parameters())
    print(f"{weights:,} adapted weights, {phi:,} meta-parameters ({meta.rule}), estimator {meta.estimator.kind}")
    print(f"a meta-step: {meta.articles} windows of {meta.truncation} segments of {segment} tokens, {step.note}")
    print(f"peak memory {step.peak / MIB:,.0f} MiB of {limit / MIB:,.0f}")
    print(f"time {step.seconds:.2f} s a meta-step, {meta.steps * step.seconds / 60:.1f} minutes for {meta.steps} steps")
    require_fit(step, limit, estimator, meta.truncation)
    return {
        "adapted_weights": weights,
        "meta_parameters": phi,
        "peak_mib": step.peak / MIB,
        "limit_mib": limit / MIB,
        "seconds_per_meta_step": step.seconds,
        "meta_steps": meta.steps,
    }


def _base(recipe: Recipe, device: torch.device) -> tuple[nn.Module, Scorer, tuple[str, ...]]:
    """Model, scorer, and the globs of what is adapted."""
    if not recipe.model.pretrained:
        model = recipe.model.build(recipe.tokenizer.vocab_size, 0, recipe.train.seed)
        cast(nn.Module, model).to(device).eval()
        return model, LSTMScorer(model), recipe.read.params
    run = Run(recipe.run)
    taken_up = run.recipe.is_file() and recipe_of_run(run.recipe).model == recipe.model
    source = run.model if taken_up else recipe.model.pretrained
    ready, params = load_base(source, recipe.lora, recipe.read.params, device)
    score = scorer_for(ready, recipe.context)
    rows = cast(Any, ready.get_input_embeddings()).weight.shape[0]
    return ready, InMidText(score, recipe.read.segment, rows) if isinstance(score, CausalScorer) else score, params


def _random_ids(n: int, vocab_size: int, device: torch.device) -> Tensor:
    return torch.randint(1, vocab_size, (n,), generator=torch.Generator().manual_seed(0)).to(device)
