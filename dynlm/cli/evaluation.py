"""The stages ``evaluate`` and ``report``: all methods over the same tokens, and what is written of it."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections import Counter
from contextlib import suppress
from dataclasses import asdict

import torch
import transformers

import dynlm
from dynlm import runs
from dynlm.adapt import Reader
from dynlm.changes import changing
from dynlm.cli.kit import model_fingerprint
from dynlm.cli.recipe import Recipe
from dynlm.cli.stages import Bench, methods_of
from dynlm.data.tokenizers import load_tokenizer, lost_share
from dynlm.evaluation.breakdowns import Reading, break_down
from dynlm.evaluation.cache import CachedReader
from dynlm.evaluation.compare import describe, summarize, write_results
from dynlm.evaluation.metrics import Counts, count
from dynlm.evaluation.parts import load_part, save_part
from dynlm.evaluation.stream import Scores, read_and_watch
from dynlm.evaluation.tap import TappedReader
from dynlm.kept import free_parts
from dynlm.methods import Method
from dynlm.optim.hub import fingerprint
from dynlm.progress import Bar
from dynlm.report.html import write_report
from dynlm.report.maps import require_titles
from dynlm.report.svg import formats
from dynlm.results import Circumstances, MethodResult, Results, load_results
from dynlm.stamps import fingerprint_files
from dynlm.types import DivergedError, InputError, TokenizedArticle


def evaluate(recipe: Recipe) -> runs.Json:
    """All methods over the same tokens of one split; results.json, losses and the report."""
    bench, config = Bench(recipe), recipe.evaluate
    methods = methods_of(bench.run, config.methods)
    if "static" not in methods:
        raise InputError(f"evaluate.methods {methods} lack 'static', the baseline of every gain: add it")
    asked = _asked(bench) | {"methods": methods}
    if (kept := _evaluated(bench.run, asked, recipe)) is not None:
        return kept
    readers = {name: bench.method(name) for name in methods}
    articles = bench.articles(config.split, config.max_articles)
    formats(recipe.report.format)  # what the report cannot do is said before hours of reading
    require_titles(recipe.report.articles, [article.title for article in articles])
    counts = count(articles)
    scores, diverged = dict[str, Scores](), dict[str, str]()
    for name, reader in readers.items():
        try:
            scores[name] = _read_or_resume(bench, name, reader, articles, asked)
        except DivergedError as error:  # the other methods go on, but without the baseline there is nothing to say
            if name == "static":
                raise
            diverged[name] = str(error)
            print(f"note: {name} diverged and is left out: {error}", flush=True)
    lost = lost_share(
        bench.tokenizer, (a.text for a in bench.corpus.split(config.split)[: config.max_articles or None])
    )
    if lost:
        print(f"note: the tokenizer loses {lost:.2%} of the text, so bits per byte are not given", flush=True)
    described = {name: describe(name, readers[name].rule, _settings(readers[name])) for name in scores}
    summary = summarize(scores, described, counts, lossless=not lost)
    words = Counter(word for article in bench.corpus.train for word in article.text.split())
    reading = Reading(articles, bench.tokenizer, words, recipe.read.segment, recipe.read.reset)
    results: Results = {
        **_circumstances(bench, articles, counts),
        **summary,
        "breakdowns": break_down(scores, reading),
        "diverged": diverged,
        "asked": asked,
    }
    write_results(bench.run, scores, articles, results)
    for name, method in sorted(summary["methods"].items(), key=lambda item: -item[1]["nats"]):
        low, high = method["gain_ci95"] or (math.nan, math.nan)
        print(
            f"{name:>12}  {_number(method['bits_per_byte'], '.4f')} bits/byte"
            f"  gain {method['gain_nats_per_token']:+.4f} [{low:+.4f}, {high:+.4f}] nats/token"
            f"  word perplexity {_number(method['word_ppl'], ',.4g')}  {method['tokens_per_s']:,.0f} tokens/s"
        )
    report(recipe)
    return _told(results)


def _asked(bench: Bench) -> runs.Json:
    """All that an evaluation depends on, as JSON, but the methods."""
    recipe, config = bench.recipe, runs.settings_of(bench.recipe.evaluate)
    tables = {name: runs.settings_of(getattr(recipe, name)) for name in ("read", "context", "lora", "prior")}
    return {"made of": {**bench.made.fingerprints}, **tables, "evaluate": {**config, "methods": []}}


def _evaluated(run: runs.Run, asked: runs.Json, recipe: Recipe) -> runs.Json | None:
    """The figures of a finished evaluation that ``--resume`` keeps; None where there is something to read.

    Raises:
        InputError: an evaluation that must not be replaced.
    """
    parts = run.parts("evaluate")
    if run.results.exists() and not run.report.exists() and not (recipe.overwrite or recipe.resume or parts.exists()):
        raise InputError(f"{run.results} is finished, its report is not: run `dynlm report`, or add --overwrite")
    free_parts(run.results, parts, recipe)
    if parts.exists() and not recipe.resume:
        with changing(run.path) as new:
            new.remove(parts)
    if not recipe.resume or parts.exists() or not run.results.exists():
        return None
    results = runs.read_json(run.results)
    if results.get("asked") == asked:
        print(f"{run.results}: kept as it was evaluated before")
        if not run.report.exists():
            report(recipe)
        return _told(load_results(run.results))
    if recipe.overwrite:
        return None
    raise InputError(f"{run.results} was made with other methods or settings: add --overwrite too, to replace it")


def _told(results: Results) -> runs.Json:
    """What ``--json`` shows of an evaluation."""
    methods = {name: _figures(method) for name, method in results["methods"].items()}
    counts = Counts(results["articles"], results["tokens"], results["words"], results["bytes"])
    return {"methods": methods, "diverged": results.get("diverged", {}), **counts._asdict()}


def _read_or_resume(
    bench: Bench, name: str, reader: Reader, articles: list[TokenizedArticle], asked: runs.Json
) -> Scores:
    """Read with one method and keep its scores, or take those that an unfinished evaluation has kept."""
    theta0, rule = model_fingerprint(reader.priors), fingerprint(reader.rule)
    made = {**asked, "methods": [name], "theta0": theta0, "rule": rule, "settings": _settings(reader)}
    path = bench.run.parts("evaluate") / f"{Method.parse(name).stem}.safetensors"
    scores = load_part(path, made) if bench.recipe.resume else None
    if scores is None:
        scores = _read(name, reader, articles, bench.tokenizer.eos_id, bench.recipe.evaluate.gate_articles)
        save_part(path, scores, made)
    else:
        print(f"{name}: kept as it was read before")
    return scores


def _number(value: float | None, form: str) -> str:
    """A figure, or a dash where there is none: a perplexity beyond all numbers, bits per byte of text that was lost."""
    return "–" if value is None else format(value, form)


def _figures(method: MethodResult) -> runs.Json:
    """What ``--json`` shows of a method; results.json holds the rest."""
    names = ("bits_per_byte", "gain_nats_per_token", "gain_ci95", "word_ppl", "tokens_per_s")
    return {name: value for name, value in method.items() if name in names}


def _settings(reader: Reader) -> dict[str, float]:
    """The rule's, and the cache's where there is one."""
    of_cache = asdict(reader.cache) if isinstance(reader, CachedReader) else {}
    return {**reader.rule.settings(), **{f"cache.{name}": value for name, value in of_cache.items()}}


def _read(name: str, reader: Reader, articles: list[TokenizedArticle], start_id: int, gate_articles: int) -> Scores:
    """``gate_articles`` counts for nothing with a cache, beside which a rule does what it does alone."""
    tapped = reader if isinstance(reader, TappedReader) else TappedReader.of(reader)
    if tapped.rule.reads_gradient:
        with suppress(DivergedError), tapped:  # kernels are built outside the timed pass
            tapped.read(dataclasses.replace(articles[0], ids_T=articles[0].ids_T[:128]), start_id)
    with Bar(total=sum(map(len, articles)), desc=f"read {name}", unit="token", unit_scale=True) as bar:
        gate_articles = 0 if Method.parse(name).cache else gate_articles
        return read_and_watch(tapped, articles, start_id, bar.update, gate_articles)


def _circumstances(bench: Bench, articles: list[TokenizedArticle], counts: Counts) -> Circumstances:
    """What results.json says of data, model and versions."""
    recipe = bench.recipe
    return {
        "data": {
            "source": recipe.data.source,
            "split": recipe.evaluate.split,
            "titles": [a.title for a in articles],
            "fingerprint": bench.corpus.fingerprint,
        },
        "reset": recipe.read.reset,
        "segment": recipe.read.segment,
        "model": {
            "class": type(bench.model).__name__,
            "parameters": bench.model.num_parameters(),
            "adapted": sum(p.theta0.numel() for p in bench.priors),
            "fingerprint": model_fingerprint(bench.priors, bench.model),
        },
        "tokenizer": {
            "class": type(bench.tokenizer).__name__,
            "vocab_size": bench.tokenizer.vocab_size,
            "fingerprint": bench.made.fingerprints["tokenizer"],
        },
        "versions": {
            "dynlm": dynlm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "articles": counts.articles,
        "tokens": counts.tokens,
        "words": counts.words,
        "bytes": counts.bytes,
    }


def report(recipe: Recipe) -> None:
    """The report of a finished evaluation."""
    run = runs.Run(recipe.run)
    run.require(run.results, "evaluate")
    used = load_results(run.results).get("tokenizer", {}).get("fingerprint")
    if run.tokenizer.is_dir() and used not in (None, fingerprint_files(run.tokenizer)):
        raise InputError(f"{run.tokenizer} is not the tokenizer that {run.results} was made with: evaluate again")
    tokenizer = load_tokenizer(run.tokenizer) if run.tokenizer.is_dir() else None
    pieces, vocab_size = (tokenizer.pieces, tokenizer.vocab_size) if tokenizer else (None, None)
    print(f"report: {write_report(run, recipe.report.format, pieces, recipe.report.articles, vocab_size)}")
    if recipe.report.format:
        print(f"figures: {run.figures}")
