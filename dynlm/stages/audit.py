"""The stage ``audit``: every method of a run, checked for leaks, lost tokens and weights that are not put back."""

from __future__ import annotations

from functools import partial

from dynlm.evaluation.audit import Verdict, adds_up, verdicts
from dynlm.files import Json
from dynlm.results import load_results
from dynlm.stages.recipe import Recipe
from dynlm.stages.run import Bench, methods_of
from dynlm.types import InputError


def audit_stage(recipe: Recipe) -> Json:
    """One line a check; exit code 2 if any fails. Writes nothing.

    The methods are those of the run's results.json, else of ``evaluate.methods``, else all that the run holds.
    """
    bench, config = Bench(recipe, any_text=True), recipe.evaluate
    evaluated = list(load_results(bench.run.results)["methods"]) if bench.run.results.is_file() else []
    methods = methods_of(bench.run, evaluated or config.methods)
    texts = bench.texts(config.split, config.max_articles)
    articles = bench.tokenize(texts)
    failed, checks = 0, list[Json]()

    def tell(method: str, verdict: Verdict) -> None:
        nonlocal failed
        failed += not verdict.passed
        checks.append({"method": method, **verdict._asdict()})
        print(
            f"{method:>14}  {verdict.name:<26} {'ok' if verdict.passed else 'FAILED':<7} {verdict.detail}", flush=True
        )

    found = [adds_up(text, a, bench.tokenizer.decode) for text, a in zip(texts, articles, strict=True)]
    wrong = next((v for v in found if not v.passed), None)
    words, n_bytes = sum(a.n_words for a in articles), sum(a.n_bytes for a in articles)
    tell("text", wrong or found[0]._replace(detail=f"{len(found)} articles, {words:,} words, {n_bytes:,} bytes"))
    start_id, vocab_size = bench.tokenizer.start_id, bench.tokenizer.vocab_size
    for name in methods:
        make_reader = partial(bench.method, name)
        for verdict in verdicts(make_reader, articles[0], articles[-1], start_id, vocab_size, quick=recipe.audit.quick):
            tell(name, verdict)
    if failed:
        raise InputError(f"{failed} checks of {bench.run.path} failed: its figures cannot be trusted")
    print(f"{len(methods)} methods, every check passed")
    return {"checks": checks}
