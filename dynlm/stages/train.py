"""The stage ``train``: tokenizer and base model, which all other stages of a run are made from."""

from __future__ import annotations

import shutil
from functools import partial

from dynlm.changes import Changes, changing
from dynlm.data.articles import Corpus, load_corpus
from dynlm.data.tokenizers import Tokenizer, load_tokenizer, tokenize, train_tokenizer
from dynlm.files import Json
from dynlm.kept import free, saved_settings
from dynlm.models.lstm import LSTMForCausalLM
from dynlm.models.train import Progress, choose_precision, train_base_model
from dynlm.processes import once
from dynlm.runs import Run
from dynlm.stages.adopt import adopt, begin_run, write_recipe
from dynlm.stages.recipe import Recipe, recipe_of_run, require_apart, require_same
from dynlm.stamps import fingerprint_files, read_stamped
from dynlm.threads import choose_threads
from dynlm.tracking import tracking
from dynlm.types import InputError


def train(recipe: Recipe, demo: bool = False) -> Json | None:
    """Tokenizer and base model from the train split, or as ``model.pretrained`` holds them."""
    run = Run(recipe.run)
    require_apart(recipe, run)
    unfinished = [work for work in (run.retraining, run) if work.checkpoint("train").exists()]
    work = unfinished[0] if unfinished else run
    free(run.model, recipe, work.checkpoint("train"))
    if recipe.resume:
        require_same(recipe, recipe_of_run(work.recipe))
    corpus = load_corpus(recipe.data)
    if recipe.model.pretrained:
        adopt(recipe, run, corpus.fingerprint)
        return None
    if recipe.lora.rank:
        raise InputError(f"lora.rank is {recipe.lora.rank}, but an LSTM takes no low-rank weights: set it to 0")
    if recipe.resume:
        tokenizer = _tokenizer_of(work, corpus)
    else:
        tokenizer = train_tokenizer(recipe.tokenizer, corpus.split("train") + corpus.meta)
        work = run.retraining if run.model.exists() and read_stamped(run.recipe)[1].finished else run
    progress = _train(recipe, work, tokenizer, corpus, demo)
    once(partial(_finish, recipe, work, run))
    print(f"best validation {progress.best:.4f} nats/token after {progress.seconds / 60:.1f} minutes of training")
    return {"validation_nats_per_token": progress.best, "steps": progress.step, "seconds": progress.seconds}


def _tokenizer_of(work: Run, corpus: Corpus) -> Tokenizer:
    """Return the tokenizer of unfinished training, which goes on with the same texts."""
    stamp = read_stamped(work.recipe)[1]
    stamp.require("data", corpus.fingerprint, "data.source", "resume with the same texts, or use --overwrite")
    found = fingerprint_files(work.require(work.tokenizer, "train"))
    stamp.require("tokenizer", found, str(work.tokenizer), "use --overwrite to start again")
    return load_tokenizer(work.tokenizer)


def _train(recipe: Recipe, work: Run, tokenizer: Tokenizer, corpus: Corpus, demo: bool) -> Progress:
    """Train in ``work``: the run itself, or a folder of it while the run holds a finished model."""
    run = Run(recipe.run)
    train_texts, valid_texts = corpus.split("train"), corpus.split("valid")
    articles = tokenize(tokenizer, train_texts), tokenize(tokenizer, valid_texts)
    saved = tokenizer.pretrained()
    special = {"eos_id": saved.eos_token_id, "pad_id": saved.pad_token_id}
    model = recipe.model.build(tokenizer.vocab_size, tokenizer.start_id, recipe.train.seed, **special)
    tokens = sum(map(len, articles[0]))
    print(f"{model.num_parameters():,} weights, {len(train_texts)} articles, {tokens:,} training tokens")
    rows = recipe.train.batch_size * recipe.train.segment
    product = rows, model.config.embedding_size, tokenizer.vocab_size  # the read-out, where most of the time goes
    print(f"threads: {choose_threads(recipe.threads, product=product)}")
    print("precision: {} ({})".format(*choose_precision(recipe.train)), flush=True)
    fresh = not recipe.resume
    if fresh and run.parts("train").parent.exists():
        with changing(run.path) as new:
            new.remove(run.checkpoint("train"), run.retraining.path)

    def save_best(best: LSTMForCausalLM, new: Changes) -> None:
        nonlocal fresh
        if fresh:  # only now is there something to put in the place of an earlier run, and of what was made from it
            begin_run(new, work, tokenizer, demo)
            fresh = False
        best.save_pretrained(new.at(work.model))
        saved.save_pretrained(new.at(work.model))
        write_recipe(new, work, recipe, corpus.fingerprint, finished=False)

    with tracking(recipe.log_with, "train", run.trackers, saved_settings(recipe)) as track:
        return train_base_model(model, articles, recipe.train, work, save_best, recipe.resume, track=track)


def _finish(recipe: Recipe, work: Run, run: Run) -> None:
    """Mark the run as finished, and put what was trained beside an earlier model in the place of that."""
    if not work.model.exists():
        raise InputError("no validation gave a finite loss: lower train.lr; nothing was replaced")
    data = read_stamped(work.recipe)[1].fingerprints["data"]
    with changing(run.path) as new:
        if work.path != run.path:
            new.remove(*run.derived())
            for made, place in ((work.tokenizer, run.tokenizer), (work.model, run.model)):
                shutil.copytree(made, new.at(place))
            for made, place in ((work.log("train"), run.log("train")), (work.demo, run.demo)):
                if made.exists():
                    shutil.copy(made, new.at(place))
        write_recipe(new, run, recipe, data, finished=True)
        new.remove(run.checkpoint("train"), run.retraining.path)
