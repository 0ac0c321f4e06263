"""The stage ``tune``: settings of the hand-made rules, of caches and of mixtures, on the meta-training articles."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from dynlm.changes import changing
from dynlm.evaluation.cache import load_cache, save_cache
from dynlm.evaluation.cache_search import tune_cache
from dynlm.evaluation.mixture import save_mixture
from dynlm.evaluation.mixture_fit import EPOCHS, SourceRecorder, fit_mixture
from dynlm.files import Json
from dynlm.kept import free, made_alike, told
from dynlm.meta.train import divide_meta_split
from dynlm.meta.tune import tune_rule
from dynlm.methods import Method
from dynlm.optim.library import load_rule
from dynlm.optim.sharing import save_rule
from dynlm.progress import Bar
from dynlm.provenance import record
from dynlm.settings import as_json
from dynlm.stages.recipe import Recipe
from dynlm.stages.run import Bench
from dynlm.types import DivergedError, TokenizedArticle


def tune(recipe: Recipe) -> Json:
    """Each rule is written when it is tuned; with ``resume`` those that are written stay as they are."""
    bench, figures, failures = Bench(recipe), Json(), list[str]()
    settings = as_json(recipe.tune)
    del settings["rules"]
    made = {"config": settings, **bench.finished()}
    for kind in recipe.tune.rules:
        free(bench.run.rule(kind), recipe)
    kept = [kind for kind in recipe.tune.rules if made_alike(bench.run.rule(kind), made, recipe)]
    articles, _ = divide_meta_split(bench.articles("meta"), recipe.meta)
    for kind in recipe.tune.rules:
        if kind in kept:
            print(f"{kind}: kept as it was tuned before")
            figures[kind] = _figures(bench.run.rule(kind))
            continue
        method = Method.parse(kind)
        tune_one = _tune_mixture if method.mix else _tune_cache if method.cache else _tune_rule
        try:
            figures[kind] = tune_one(bench, kind, articles, made)
        except DivergedError as error:  # the other rules go on
            failures.append(str(error))
    if failures:
        raise DivergedError("; ".join(dict.fromkeys(failures)))
    return {"rules": figures}


def _figures(path: Path) -> Json:
    """Return what ``--json`` shows of a tuned rule or cache."""
    method, settings = Method.parse(path.name), Json()
    if not method.mix:
        settings = asdict(load_cache(path)) if method.cache else load_rule(path)[0].settings()
    return {"nats_per_token": told(path)["nats_per_token"], "settings": settings}


def _tune_rule(bench: Bench, kind: str, articles: list[TokenizedArticle], made: Json) -> Json:
    """Settings of the hand-made rule ``kind``."""
    config = bench.recipe.tune
    with Bar(total=config.trials, desc=f"tune {kind}", unit="trial") as bar:
        tuned = tune_rule(kind, bench.reader, articles, bench.tokenizer.start_id, config, bar.update)
    found = {"nats_per_token": tuned.nats_per_token, "trials": tuned.trials}
    with changing(bench.run.path) as new:
        save_rule(tuned.rule, new.at(bench.run.rule(kind)), {**found, **made})
        record(new, bench.run, bench.run.rule(kind))
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in tuned.rule.settings().items())
    print(f"{kind}: {tuned.nats_per_token:.4f} nats/token with {numbers}; static {tuned.static:.4f}")
    if tuned.at_bound:
        print(f"{kind}: {', '.join(tuned.at_bound)} at the edge of the searched range; more trials may help")
    return _figures(bench.run.rule(kind))


def _tune_cache(bench: Bench, name: str, articles: list[TokenizedArticle], made: Json) -> Json:
    """Settings of the cache of method ``name``, on what the hand-made rules are tuned on."""
    config, beside = bench.recipe.tune, str(Method.parse(name).inner)
    with Bar(desc=f"tune {name}", unit="trial") as bar:
        tuned = tune_cache(bench.method(beside), config.excerpts(articles), bench.tokenizer.start_id, bar.update)
    found = {"nats_per_token": tuned.nats_per_token, "trials": tuned.trials}
    with changing(bench.run.path) as new:
        save_cache(tuned.cache, new.at(bench.run.rule(name)), {**found, **made})
        record(new, bench.run, bench.run.rule(name))
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in asdict(tuned.cache).items())
    print(f"{name}: {tuned.nats_per_token:.4f} nats/token with {numbers}, {tuned.nats_without:.4f} without the cache")
    if tuned.at_bound:
        print(f"{name}: {', '.join(tuned.at_bound)} at the edge of the searched grid")
    return _figures(bench.run.rule(name))


def _tune_mixture(bench: Bench, name: str, articles: list[TokenizedArticle], made: Json) -> Json:
    """Network of the mixture of method ``name``, on what the hand-made rules are tuned on."""
    config, recorder = bench.recipe.tune, bench.mixed(Method.parse(name), SourceRecorder)
    with Bar(total=EPOCHS, desc=f"tune {name}", unit="epoch") as bar:
        fitted = fit_mixture(
            recorder, config.excerpts(articles), bench.tokenizer.start_id, seed=config.seed, progress=bar.update
        )
    found = {"nats_per_token": fitted.nats_per_token, "passes": fitted.passes}
    with changing(bench.run.path) as new:
        save_mixture(fitted.mixture, new.at(bench.run.rule(name)), {**found, **made})
        record(new, bench.run, bench.run.rule(name))
    shares = ", ".join(f"{weight:.3f}" for weight in fitted.weights)
    print(f"{name}: {fitted.nats_per_token:.4f} nats/token held out, {fitted.constant:.4f} with weights {shares}")
    return _figures(bench.run.rule(name))
