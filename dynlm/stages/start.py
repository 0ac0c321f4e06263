"""The stage ``learn-start``: a start θ0 of the base model from which a rule reads better, from training articles."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from dynlm.changes import changing
from dynlm.checkpoints import resuming, step_of
from dynlm.data.segments import article_segments
from dynlm.evaluation.stream import read_articles
from dynlm.files import Json, read_tensors, write_tensors
from dynlm.inner import InnerLoop
from dynlm.kept import free, made_alike, saved_settings, told
from dynlm.meta.initialisation import Task
from dynlm.meta.outer import Checkpoint, OuterProgress, learn_start
from dynlm.meta.train import divide_meta_split
from dynlm.methods import Method
from dynlm.optim.registry import trained
from dynlm.optim.sharing import fingerprint
from dynlm.processes import once, require_work
from dynlm.progress import Bar
from dynlm.provenance import record
from dynlm.settings import as_json
from dynlm.stages.recipe import Recipe
from dynlm.stages.run import Bench
from dynlm.tracking import tracking
from dynlm.types import InputError, TokenizedArticle


def learn_start_stage(recipe: Recipe) -> Json:
    """θ0 by ``start.method`` with ``start.rule`` in the inner loop; kept in RUN/starts, read as ``RULE@METHOD``."""
    bench, config = Bench(recipe), recipe.start
    target, checkpoint = bench.run.start(config.method), bench.run.checkpoint(f"learn-start-{config.method}")
    rule = bench.rule(config.rule)
    if config.outer.phi_lr and Method.parse(config.rule).rule not in trained():
        raise InputError(f"start.outer.phi_lr trains learned rules, start.rule is {config.rule!r}: set it to 0")
    made = {"config": as_json(config), "rule": fingerprint(rule), **bench.finished()}
    if not checkpoint.exists() and made_alike(target, made, recipe):
        print(f"{target}: kept as it was learned before")
        return _told(target)
    free(target, recipe, checkpoint)
    require_work(config.outer.tasks, "start.outer.tasks")
    priors = [prior._replace(theta0=prior.theta0.clone()) for prior in bench.priors]  # θ0 is learned in place
    reader, sample = bench.reader(rule, priors=priors), ArticleTasks(bench, config.segments, config.seed)
    loop = _Learning(bench, reader, sample, made, checkpoint)
    learned = loop.run(recipe.resume)
    found = {"valid": learned.valid, "best": learned.best, "best_step": learned.best_step}
    found |= {"train": learned.train_losses, "seconds": time.perf_counter() - loop.started}
    tensors = {prior.name: prior.theta0 for prior in reader.priors}
    if config.outer.phi_lr:
        tensors |= {f"rule.{name}": value for name, value in rule.state_dict().items()}
    with changing(bench.run.path) as new:
        write_tensors(new.at(target), tensors, {**found, **made})
        record(new, bench.run, target)
        new.remove(checkpoint)
    for restart in learned.restarts:
        print(f"restarted from the best start with half the rate ({restart})")
    print(f"best meta-validation {learned.best:.4f} nats/token at step {learned.best_step}: {target}")
    return _told(target)


def _told(target: Path) -> Json:
    """Return what ``--json`` shows of a start."""
    made = told(target)
    return {"meta_validation_nats_per_token": made["best"], "best_step": made["best_step"], "start": str(target)}


class _Learning:
    """The outer loop on articles, with a checkpoint after every validation."""

    def __init__(self, bench: Bench, reader: InnerLoop, sample: ArticleTasks, made: Json, checkpoint: Path) -> None:
        self.bench, self.reader, self.sample, self.made, self.checkpoint = bench, reader, sample, made, checkpoint
        _, self.held_back = divide_meta_split(bench.articles("meta"), bench.recipe.meta)
        self.started = time.perf_counter()

    def run(self, resume: bool) -> OuterProgress:
        """Learn the start, or go on with learning it."""
        config, before = self.bench.recipe.start, None
        if resume:
            before = self._load()
        elif self.checkpoint.exists():
            with changing(self.bench.run.path) as new:
                new.remove(self.checkpoint)
        first = before[1]["step"] if before else 0
        run, settings = self.bench.run, saved_settings(self.bench.recipe)
        followed = tracking(self.bench.recipe.log_with, "learn-start", run.trackers, settings)
        with followed as track, Bar(config.outer.steps, config.method, initial=first) as self.bar:
            steps = config.method, self.reader, self.sample, config.outer, self._validate, self.bar.update
            return learn_start(*steps, keep=self._keep, resume=before, track=track)

    def _validate(self) -> float:
        tokens, start_id = sum(map(len, self.held_back)), self.bench.tokenizer.start_id
        value = read_articles(self.reader, self.held_back, start_id).nats / tokens
        rule = self.bench.recipe.start.rule
        self.bar.write(f"step {self.bar.n}: meta-validation {value:.4f} nats/token with {rule}")
        return value

    def _keep(self, state: Checkpoint) -> None:
        tensors, meta = state
        told = {"seconds": time.perf_counter() - self.started, **self.made}
        tensors = {**tensors, "rng": self.sample.generator.get_state()}
        once(lambda: write_tensors(self.checkpoint, tensors, {**meta, **told}))

    def _load(self) -> Checkpoint:
        tensors, meta = read_tensors(self.checkpoint)
        if meta.get("rule") != self.made["rule"]:
            raise InputError(f"{self.checkpoint} was made with another rule: put it back, or use --overwrite")
        with resuming(meta, self.bench.recipe.start, "start", model=self.made["model"]):
            step_of(meta, self.bench.recipe.start.outer.steps)
            self.started -= meta["seconds"]
            self.sample.generator.set_state(tensors.pop("rng"))
        return tensors, meta


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
        pieces = list(article_segments(ids_T[: self.segments * length], self.bench.tokenizer.start_id, length))
        tokens = sum(targets_S.numel() for _, targets_S in pieces)
        return Task(pieces, [targets_S.numel() / tokens for _, targets_S in pieces])
