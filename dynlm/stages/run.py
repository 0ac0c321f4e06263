"""What the stages after training share, and meta-train: each works from the files of the one before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property

import torch

from dynlm.changes import Changes, changing
from dynlm.data.articles import Corpus, DataConfig, load_corpus, load_texts
from dynlm.data.tokenizers import load_tokenizer
from dynlm.files import Json, read_tensors, write_tensors
from dynlm.kept import free, is_finished, saved_settings
from dynlm.meta.train import MetaProgress, meta_train
from dynlm.methods import STATELESS, STATIC, Method
from dynlm.models.causal import CausalScorer, scorer_for
from dynlm.models.params import adapted_parameters
from dynlm.models.ready import load_base
from dynlm.optim.base import Prior, Rule
from dynlm.optim.registry import RULES
from dynlm.optim.sharing import save_rule
from dynlm.priors import make_priors
from dynlm.processes import once
from dynlm.provenance import record
from dynlm.runs import Run
from dynlm.session.api import rule_trainer
from dynlm.session.prior import measured, read_prior
from dynlm.session.session import Session, open_run
from dynlm.stages.recipe import Recipe, recipe_of_run, require_same
from dynlm.stamps import Stamp
from dynlm.threads import choose_threads
from dynlm.tracking import tracking
from dynlm.types import Article, InputError, TokenizedArticle

USUAL = {"sgd": "tune", "rms": "tune", "adam": "tune", "gated": "meta-train"}
"""rules that a comparison usually has, and the commands that make them"""


class Bench(Session):
    """The session of a run directory with the settings of a recipe; its corpus and prior come when first used."""

    run: Run
    stamp: Stamp

    def __init__(self, recipe: Recipe, *, any_text: bool = False) -> None:
        """``any_text``: ``recipe.data`` may name another source, whose texts are only read."""
        run = Run(recipe.run)
        trained = recipe_of_run(run.require(run.recipe, "train"))
        self.other: DataConfig | None = None
        if any_text and recipe.data.source != trained.data.source:
            self.other, recipe = recipe.data, dataclasses.replace(recipe, data=trained.data)
            print(f"note: {self.other.source} is not what this run was trained on", flush=True)
        require_same(recipe, trained)
        _, stamp = open_run(run)
        if stamp.finished and run.retraining.recipe.exists():
            print("note: the base model is being trained again; the earlier one is used until then", flush=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, params = load_base(run.model, recipe.lora, recipe.read.params, device)
        self.recipe = dataclasses.replace(recipe, read=dataclasses.replace(recipe.read, params=params))
        super().__init__(
            model,
            lambda model: scorer_for(model, recipe.context),
            load_tokenizer(run.tokenizer),
            self._measured,
            self.recipe.read,
            source=str(run.path),
            run=run,
            stamp=stamp,
        )
        print(f"threads: {choose_threads(recipe.threads, model.num_parameters())}", flush=True)

    @cached_property
    def corpus(self) -> Corpus:
        corpus = load_corpus(self.recipe.data)
        advice = "put back the texts or the split that the run was trained on, or train in another --run"
        self.stamp.require("data", corpus.fingerprint, f"data.source {self.recipe.data.source!r}", advice)
        return corpus

    def finished(self) -> Json:
        """Return what a finished rule, cache or start says of itself: the base model that it belongs to."""
        return {"model": self.stamp.fingerprints["model"], "finished": True}

    def texts(self, split: str, limit: int = 0) -> tuple[Article, ...]:
        """Return the first articles of a split of the corpus, or of another source."""
        found = load_texts(self.other, split) if self.other else self.corpus.split(split)
        return found[: limit or None]

    def train_texts(self) -> Iterator[str]:
        """Yield the text that the model was trained on; nothing where another source is read and it is not at hand."""
        try:
            yield from (article.text for article in self.corpus.train)
        except InputError:
            if self.other is None:
                raise

    def articles(self, split: str, limit: int = 0) -> list[TokenizedArticle]:
        return self.tokenize(self.texts(split, limit))

    def _measured(self) -> list[Prior]:
        """θ0 and its static RMS: from the run directory, or measured and kept there."""
        adapted = adapted_parameters(self.model, self.config.params)
        settings = {
            "params": [a.name for a in adapted],
            "segment": self.config.segment,
            "tokens": self.recipe.prior.tokens,
            "model": self.stamp.fingerprints["model"],
        }
        if isinstance(self.score, CausalScorer):
            settings["context"] = asdict(self.recipe.context)
        if self.run.prior.is_file():
            _, meta = read_tensors(self.run.prior)
            if meta == settings:
                return make_priors(adapted, read_prior(self.run.prior, adapted)[0])
        train = self.corpus.split("train")
        priors = measured(self.model, self.score, train, self.tokenizer, self.config, self.recipe.prior.tokens)
        once(lambda: write_tensors(self.run.prior, {p.name: p.rms for p in priors}, settings))
        return priors


def meta_training(recipe: Recipe) -> Json:
    """Return a learned rule, from the tuned hand-made rule that it starts at, on the meta-training articles."""
    bench, kind = Bench(recipe), recipe.meta.rule
    stage = Method("meta-train", recipe.meta.seed).stem
    target, checkpoint = bench.run.rule(str(Method(kind, recipe.meta.seed))), bench.run.checkpoint(stage)
    free(target, recipe, checkpoint)
    start, stamp, kept = bench.rule(RULES[kind].start).settings(), bench.finished(), is_finished(target)
    trainer, validate = rule_trainer(bench, bench.articles("meta"), start, recipe.meta, stamp["model"])
    if not recipe.resume and checkpoint.exists():
        with changing(bench.run.path) as new:
            new.remove(checkpoint)

    def save_best(best: Rule, progress: MetaProgress, new: Changes, finished: bool = False) -> None:
        if finished or not kept:  # an earlier rule stays until this one is finished
            made = {"progress": progress._asdict(), "config": asdict(recipe.meta), "start": start}
            save_rule(best, new.at(target), {**made, **stamp, "finished": finished})
            record(new, bench.run, target)

    with tracking(recipe.log_with, stage, bench.run.trackers, saved_settings(recipe)) as track:
        progress = meta_train(trainer, validate, bench.run, save_best, recipe.resume, stage, track=track)
    trainer.reader.restore()
    with changing(bench.run.path) as new:
        save_best(trainer.best, progress, new, finished=True)
        new.remove(checkpoint)
    print(f"best meta-validation {progress.best:.4f} nats/token; {progress.seconds / 60:.1f} minutes")
    return {"meta_validation_nats_per_token": progress.best, "steps": progress.step, "seconds": progress.seconds}


def methods_of(run: Run, chosen: Sequence[str]) -> list[str]:
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
