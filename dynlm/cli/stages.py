"""What the stages after training share, and meta-train: each works from the files of the one before."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import torch

from dynlm import runs
from dynlm.adapt import ReadConfig, Reader, make_priors, measure_priors
from dynlm.changes import Changes, changing
from dynlm.cli.adopt import load_base
from dynlm.cli.kit import read_prior
from dynlm.cli.recipe import Recipe, recipe_of_run, require_same
from dynlm.data.articles import Corpus, load_corpus
from dynlm.data.segments import article_segments
from dynlm.data.tokenizers import load_tokenizer, tokenize
from dynlm.evaluation.cache import CachedReader, load_cache
from dynlm.evaluation.stateless import StatelessScorer
from dynlm.evaluation.stream import read_articles
from dynlm.kept import free, is_finished, told
from dynlm.meta.train import MetaProgress, MetaTrainer, divide_meta_split, meta_train
from dynlm.methods import STATELESS, STATIC, Method
from dynlm.models.causal import CausalScorer, scorer_for
from dynlm.models.params import adapted_parameters
from dynlm.optim.base import Prior, Rule
from dynlm.optim.general import General
from dynlm.optim.handmade import Static
from dynlm.optim.library import load_rule, save_rule, start_rule
from dynlm.optim.registry import RULES, made_by, trained
from dynlm.progress import Bar
from dynlm.settings import check
from dynlm.stamps import fingerprint_files, read_stamped, unfinished
from dynlm.threads import choose_threads
from dynlm.types import Article, InputError, TokenizedArticle

USUAL = {"sgd": "tune", "rms": "tune", "adam": "tune", "gated": "meta-train"}
"""rules that a comparison usually has, and the commands that make them"""


class StartRecord(TypedDict):
    """What a learned start says of itself; it holds more."""

    config: runs.Json
    best_step: int


class Bench:
    """What the stages after training work with, loaded when first used."""

    def __init__(self, recipe: Recipe) -> None:
        self.run = runs.Run(recipe.run)
        require_same(recipe, recipe_of_run(self.run.require(self.run.recipe, "train")))
        self.made = read_stamped(self.run.recipe)[1]
        for name, folder in (("tokenizer", self.run.tokenizer), ("model", self.run.model)):
            found = fingerprint_files(self.run.require(folder, "train"))
            self.made.require(name, found, str(folder), "put back the one that belongs to the run, or train again")
        if not self.made.finished:
            print(unfinished(self.run.model, "train"), flush=True)
        elif self.run.retraining.recipe.exists():
            print("note: the base model is being trained again; the earlier one is used until then", flush=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, params = load_base(self.run.model, recipe.lora, recipe.read.params, self.device)
        self.recipe = dataclasses.replace(recipe, read=dataclasses.replace(recipe.read, params=params))
        self.score = scorer_for(self.model, recipe.context)
        print(f"threads: {choose_threads(recipe.threads, self.model.num_parameters())}", flush=True)
        self.tokenizer = load_tokenizer(self.run.tokenizer)

    @cached_property
    def corpus(self) -> Corpus:
        corpus = load_corpus(self.recipe.data)
        advice = "put back the texts or the split that the run was trained on, or train in another --run"
        self.made.require("data", corpus.fingerprint, f"data.source {self.recipe.data.source!r}", advice)
        return corpus

    def stamp(self) -> runs.Json:
        """What a finished rule, cache or start says of itself: the base model that it belongs to."""
        return {"model": self.made.fingerprints["model"], "finished": True}

    def require_own(self, path: Path) -> None:
        """Refuse a rule, cache or start that says that it was made with another base model; note an unfinished one."""
        made = told(path)
        self.made.require_own(path, made)
        if made.get("finished", True) is not True:
            print(unfinished(path, "learn-optimizer" if path.stem == General.name else "meta-train"), flush=True)

    def articles(self, split: str, limit: int = 0) -> list[TokenizedArticle]:
        chosen = self.corpus.split(split)
        return tokenize(self.tokenizer, chosen[: limit or None])

    @cached_property
    def priors(self) -> list[Prior]:
        """θ0 and its static RMS: from the run directory, or measured and kept there."""
        adapted = adapted_parameters(self.model, self.recipe.read.params)
        names = [a.name for a in adapted]
        settings = {"params": names, "segment": self.recipe.read.segment, "tokens": self.recipe.prior.tokens}
        settings["model"] = self.made.fingerprints["model"]
        if isinstance(self.score, CausalScorer):
            settings["context"] = asdict(self.recipe.context)
        if self.run.prior.is_file():
            _, meta = runs.read_tensors(self.run.prior)
            if meta == settings:
                return make_priors(adapted, read_prior(self.run.prior, adapted)[0])
        pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
        for article in tokenize(self.tokenizer, _first_tokens(self.corpus.split("train"), self.recipe.prior.tokens)):
            ids_T = article.ids_T.to(self.device)
            pieces.extend(article_segments(ids_T, self.tokenizer.eos_id, self.recipe.read.segment))
        pieces = pieces[: max(1, self.recipe.prior.tokens // self.recipe.read.segment)]
        with Bar(len(pieces), "static RMS of the gradient", "segment") as bar:
            priors = measure_priors(self.model, self.score, bar.over(pieces), self.recipe.read.params)
        runs.write_tensors(self.run.prior, {p.name: p.rms for p in priors}, settings)
        return priors

    def reader(self, rule: Rule, config: ReadConfig | None = None) -> Reader:
        rule.to(self.device)
        return Reader(self.model, self.score, rule, self.priors, config or self.recipe.read)

    def method(self, name: str) -> Reader:
        """The reader of a method of ``evaluate.methods``: RULE, or RULE@START with a start of ``learn-start``.

        ``cache`` and METHOD+cache put a neural cache beside static reading or beside METHOD; ``stateless`` is static
        reading that carries nothing from segment to segment.
        """
        method = Method.parse(name)
        if method.cache:
            path = self.run.require(self.run.rule(name), f"tune --tune.rules {name}")
            self.require_own(path)
            return CachedReader.beside(self.method(str(method.uncached)), load_cache(path))
        rule = self.load_rule(str(replace(method, start="")))
        score = StatelessScorer(self.score) if method.rule == STATELESS else self.score
        priors = self._started(rule, method.start) if method.start else self.priors
        return Reader(self.model, score, rule.to(self.device), priors, self.recipe.read)

    def _started(self, rule: Rule, start: str) -> list[Prior]:
        """The priors of a learned start; ``rule`` becomes what was learned together with it."""
        path = self.run.require(self.run.start(start), "learn-start")
        self.require_own(path)
        tensors, made = runs.read_tensors(path)
        check(StartRecord, made, str(path))
        layout = {prior.name: prior.theta0 for prior in self.priors}
        if any(key.startswith("rule.") for key in tensors):
            layout |= {f"rule.{name}": value for name, value in rule.state_dict().items()}
        runs.require_layout(path, tensors, layout, advice=": learn it again")
        phi = {key.removeprefix("rule."): value for key, value in tensors.items() if key.startswith("rule.")}
        if phi and rule.name in trained():  # learned together with this start
            rule.load_state_dict(phi)
        return [p._replace(theta0=tensors[p.name].to(p.theta0)) for p in self.priors]

    def load_rule(self, name: str) -> Rule:
        if name in (STATIC, STATELESS):
            return Static()
        path = self.run.require(self.run.rule(name), made_by(Method.parse(name).rule))
        self.require_own(path)
        return load_rule(path)[0]


def _first_tokens(articles: tuple[Article, ...], tokens: int) -> list[Article]:
    """Enough articles for so many tokens, taking a token as one byte at the least."""
    chosen, n_bytes = [], 0
    for article in articles:
        if n_bytes >= 8 * tokens:
            break
        chosen.append(article)
        n_bytes += article.n_bytes
    return chosen


def meta_training(recipe: Recipe) -> runs.Json:
    """A learned rule, from the tuned hand-made rule that it starts at, on the meta-training articles."""
    bench, kind = Bench(recipe), recipe.meta.rule
    stage = Method("meta-train", recipe.meta.seed).stem
    target, checkpoint = bench.run.rule(str(Method(kind, recipe.meta.seed))), bench.run.checkpoint(stage)
    free(target, recipe, checkpoint)
    articles, held_back = divide_meta_split(bench.articles("meta"), recipe.meta)
    start = bench.load_rule(RULES[kind].start).settings()
    rule = start_rule(kind, start, bench.priors, recipe.meta.seed, recipe.meta.hidden)
    reader, stamp = bench.reader(rule), bench.stamp()
    trainer = MetaTrainer(reader, articles, bench.tokenizer.eos_id, recipe.meta, stamp["model"])
    tokens, kept = sum(map(len, held_back)), is_finished(target)
    if not recipe.resume and checkpoint.exists():
        with changing(bench.run.path) as new:
            new.remove(checkpoint)

    def validate() -> float:
        return read_articles(reader, held_back, bench.tokenizer.eos_id).nats / tokens

    def save_best(best: Rule, progress: MetaProgress, new: Changes, finished: bool = False) -> None:
        if finished or not kept:  # an earlier rule stays until this one is finished
            made = {"progress": progress._asdict(), "config": asdict(recipe.meta), "start": start}
            save_rule(best, new.at(target), {**made, **stamp, "finished": finished})

    progress = meta_train(trainer, validate, bench.run, save_best, recipe.resume, stage)
    reader.restore()
    with changing(bench.run.path) as new:
        save_best(trainer.best, progress, new, finished=True)
        new.remove(checkpoint)
    print(f"best meta-validation {progress.best:.4f} nats/token; {progress.seconds / 60:.1f} minutes")
    return {"meta_validation_nats_per_token": progress.best, "steps": progress.step, "seconds": progress.seconds}


def methods_of(run: runs.Run, chosen: Sequence[str]) -> list[str]:
    """Return the methods to read with: those chosen, or the baselines and every rule that the run holds.

    Raises:
        InputError: a method that is named twice.
    """
    chosen = [str(Method.parse(name)) for name in chosen]
    if len(set(chosen)) < len(chosen):
        twice = next(name for name in chosen if chosen.count(name) > 1)
        raise InputError(f"evaluate.methods names {twice!r} twice: name each method once")
    if chosen:
        return chosen
    held = run.rules()
    missing = [f"{name} (`dynlm {made_by}`)" for name, made_by in USUAL.items() if name not in held]
    if missing:
        print(f"note: this run has no {', '.join(missing)}: they are left out", flush=True)
    return [STATIC, STATELESS, *held]
