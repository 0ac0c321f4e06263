"""The stage ``learn-start``: a start θ0 of the base model from which a rule reads better, from training articles."""

from __future__ import annotations

import time
from dataclasses import asdict

import torch

from dynlm import runs
from dynlm.cli.kept import free
from dynlm.cli.recipe import Recipe
from dynlm.cli.stages import Bench
from dynlm.data.segments import article_segments
from dynlm.evaluate.stream import read_articles
from dynlm.meta.initialisation import Task
from dynlm.meta.outer import learn_start
from dynlm.meta.train import divide_meta_split
from dynlm.optim.library import LEARNED, seedless
from dynlm.progress import Bar
from dynlm.types import InputError, TokenizedArticle


def learn_start_stage(recipe: Recipe) -> runs.Json:
    """θ0 by ``start.method`` with ``start.rule`` in the inner loop; kept in RUN/starts, read as ``RULE@METHOD``."""
    bench, config = Bench(recipe), recipe.start
    target = bench.run.start(config.method)
    free(target, recipe)
    rule = bench.load_rule(config.rule)
    if config.outer.phi_lr and seedless(config.rule) not in LEARNED:
        raise InputError(f"start.outer.phi_lr trains learned rules, start.rule is {config.rule!r}: set it to 0")
    reader, sample = bench.reader(rule), ArticleTasks(bench, config.segments, config.seed)
    _, held_back = divide_meta_split(bench.articles("meta"), recipe.meta)
    tokens, started = sum(map(len, held_back)), time.perf_counter()

    def validate() -> float:
        value = read_articles(reader, held_back, bench.tokenizer.eos_id).nats / tokens
        bar.write(f"step {bar.n}: meta-validation {value:.4f} nats/token with {config.rule}")
        return value

    with Bar(total=config.outer.steps, desc=config.method, unit="step") as bar:
        learned = learn_start(config.method, reader, sample, config.outer, validate, bar.update)
    made = {
        "config": asdict(config),
        "valid": learned.valid,
        "best_step": learned.best_step,
        "train": learned.train_losses,
        "seconds": time.perf_counter() - started,
    }
    tensors = {prior.name: prior.theta0 for prior in reader.priors}
    if config.outer.phi_lr:
        tensors |= {f"rule.{name}": value for name, value in rule.state_dict().items()}
    runs.write_tensors(target, tensors, made)
    for restart in learned.restarts:
        print(f"restarted from the best start with half the rate ({restart})")
    print(f"best meta-validation {learned.best:.4f} nats/token at step {learned.best_step}: {target}")
    return {"meta_validation_nats_per_token": learned.best, "best_step": learned.best_step, "start": str(target)}


class ArticleTasks:
    """Draws training articles, each cut to its first segments; every segment's loss counts by its tokens."""

    def __init__(self, bench: Bench, segments: int, seed: int) -> None:
        self.bench, self.segments = bench, segments
        self.articles: list[TokenizedArticle] = bench.articles("train")
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> Task:
        article = self.articles[int(torch.randint(len(self.articles), (), generator=self.generator))]
        ids_T = article.ids_T.to(self.bench.device)
        length = self.bench.recipe.read.segment
        pieces = list(article_segments(ids_T[: self.segments * length], self.bench.tokenizer.eos_id, length))
        tokens = sum(targets_S.numel() for _, targets_S in pieces)
        return Task(pieces, [targets_S.numel() / tokens for _, targets_S in pieces])
