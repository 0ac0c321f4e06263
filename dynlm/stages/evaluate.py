"""The stages ``evaluate`` and ``report``: all methods over the same tokens, and what is written of it."""

from __future__ import annotations

from functools import partial

from dynlm.changes import changing
from dynlm.evaluation.parts import load_part, save_part
from dynlm.evaluation.stream import Scores
from dynlm.files import Json
from dynlm.inner import InnerLoop
from dynlm.kept import free_parts
from dynlm.methods import Method
from dynlm.optim.sharing import fingerprint
from dynlm.processes import once
from dynlm.report.maps import require_titles
from dynlm.report.svg import formats
from dynlm.report.tables import table
from dynlm.results import load_results
from dynlm.runs import Run
from dynlm.session.evaluation import (
    Results,
    evaluate_readers,
    read_method,
    read_of,
    report_of_run,
    settings_of,
    told,
)
from dynlm.session.session import model_fingerprint
from dynlm.settings import as_json
from dynlm.stages.recipe import Recipe
from dynlm.stages.run import Bench, methods_of
from dynlm.types import InputError, TokenizedArticle


def evaluate(recipe: Recipe) -> Json:
    """Return all methods over the same tokens of one split; results.json, losses and the report."""
    bench, config = Bench(recipe, any_text=True), recipe.evaluate
    methods = methods_of(bench.run, config.methods)
    asked = _asked(bench) | {"methods": methods}
    if (kept := _evaluated(bench.run, asked, recipe)) is not None:
        return kept
    readers = {name: bench.method(name) for name in methods}
    texts = bench.texts(config.split, config.max_articles)
    formats(recipe.report.format)  # what the report cannot do is said before hours of reading
    require_titles(recipe.report.articles, [text.title for text in texts])

    def read(name: str, reader: InnerLoop, articles: list[TokenizedArticle]) -> Scores:
        """Keep the scores of one method, or take those that an unfinished evaluation has kept."""
        theta0, rule = model_fingerprint(reader.priors), fingerprint(reader.rule)
        made = {**asked, "methods": [name], "theta0": theta0, "rule": rule, "settings": settings_of(reader)}
        path = bench.run.parts("evaluate") / f"{Method.parse(name).stem}.safetensors"
        scores = load_part(path, made) if recipe.resume else None
        if scores is not None:
            print(f"{name}: kept as it was read before")
            return scores
        scores = read_method(name, reader, articles, bench.tokenizer.start_id, config.gate_articles)
        once(lambda: save_part(path, scores, made))
        return scores

    corpus = "" if bench.other else bench.stamp.fingerprints["data"]  # which the texts were compared with
    about = read_of(texts, recipe.data.source, config.split, corpus)
    results = evaluate_readers(readers, bench, texts, train_texts=bench.train_texts(), read=read, about=about)
    results.data["asked"] = asked
    once(partial(_write, recipe, results))
    return told(results.data)


def _write(recipe: Recipe, results: Results) -> None:
    """Write results.json, the losses and the report, and show the table."""
    results.save(recipe.run)
    print(results.table())
    report(recipe)


def report(recipe: Recipe) -> None:
    """The report of a finished evaluation."""
    run = Run(recipe.run)
    print(f"report: {report_of_run(run, recipe.report.format, recipe.report.articles)}")
    if recipe.report.format:
        print(f"figures: {run.figures}")
    if recipe.report.table:
        print(table(load_results(run.results), recipe.report.table), end="")


def _asked(bench: Bench) -> Json:
    """Return all that an evaluation depends on, as JSON, but the methods."""
    recipe, config = bench.recipe, as_json(bench.recipe.evaluate)
    tables = {name: as_json(getattr(recipe, name)) for name in ("read", "context", "lora", "prior")}
    if bench.other:
        tables["data"] = as_json(bench.other)
    return {"made of": {**bench.stamp.fingerprints}, **tables, "evaluate": {**config, "methods": []}}


def _evaluated(run: Run, asked: Json, recipe: Recipe) -> Json | None:
    """Return the figures of a finished evaluation that ``--resume`` keeps; None where there is something to read.

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
    results = load_results(run.results)
    if results.get("asked") == asked:
        print(f"{run.results}: kept as it was evaluated before")
        if not run.report.exists():
            once(partial(report, recipe))
        return told(results)
    if recipe.overwrite:
        return None
    raise InputError(f"{run.results} was made with other methods or settings: add --overwrite too, to replace it")
