"""The stage ``plan``: what meta-training will take in memory and time, predicted on a fresh model and random text."""

from __future__ import annotations

from typing import cast

import torch

from dynlm.adapt import Reader, measure_priors
from dynlm.allocator import MIB
from dynlm.cli.recipe import Recipe
from dynlm.data.segments import article_segments
from dynlm.meta.estimators import make_estimator
from dynlm.meta.plan import available_memory, peak_memory, plan_step, require_fit
from dynlm.models.causal import LSTMScorer
from dynlm.optim.library import start_rule

START = {"lr": 2e-3, "eps": 5e-4, "decay": 1e-3}  # any settings: they move no cost


def plan(recipe: Recipe) -> None:
    """Needs nothing on disk and writes nothing. Exit code 2, with what would fit, where memory is too small."""
    meta, segment = recipe.meta, recipe.read.segment
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = recipe.model.build(recipe.tokenizer.vocab_size, 0, recipe.train.seed)
    cast(torch.nn.Module, model).to(device).eval()
    score = LSTMScorer(model)
    ids_T = torch.randint(1, recipe.tokenizer.vocab_size, (8 * segment,), generator=torch.Generator().manual_seed(0))
    pieces = list(article_segments(ids_T.to(device), 0, segment))
    priors = measure_priors(model, score, iter(pieces[:2]), recipe.read.params)
    rule = start_rule(meta.rule, START, priors, meta.seed, meta.hidden).to(device)
    reader = Reader(model, score, rule, priors, recipe.read)
    estimator = make_estimator(reader, meta.estimator)
    step = plan_step(estimator, pieces, meta.truncation, meta.articles)
    limit = recipe.plan.memory * MIB or available_memory() + peak_memory()
    weights, phi = sum(t.numel() for t in reader.thetas), sum(p.numel() for p in rule.parameters())
    print(f"{weights:,} adapted weights, {phi:,} meta-parameters ({meta.rule}), estimator {meta.estimator.kind}")
    print(f"a meta-step: {meta.articles} windows of {meta.truncation} segments of {segment} tokens, {step.note}")
    print(f"peak memory {step.peak / MIB:,.0f} MiB of {limit / MIB:,.0f}")
    print(f"time {step.seconds:.2f} s a meta-step, {meta.steps * step.seconds / 60:.1f} minutes for {meta.steps} steps")
    require_fit(step, limit, estimator, meta.truncation)
