"""The stage ``audit``: every method of a run, checked for leaks, lost tokens and weights that are not put back."""

from __future__ import annotations

from functools import partial

from dynlm.cli.recipe import Recipe
from dynlm.cli.stages import Bench
from dynlm.evaluate.audit import Verdict, adds_up, audit, excerpt
from dynlm.runs import read_json
from dynlm.types import InputError

SEGMENTS = 6  # read of each article


def audit_stage(recipe: Recipe) -> None:
    """One line a check; exit code 2 if any fails. Writes nothing.

    The methods are those of the run's results.json, or of ``evaluate.methods`` before there is one.
    """
    bench, config = Bench(recipe), recipe.evaluate
    methods = list(read_json(bench.run.results)["methods"]) if bench.run.results.is_file() else list(config.methods)
    texts = bench.corpus.split(config.split)[: config.max_articles or None]
    articles = bench.articles(config.split, config.max_articles)
    failed = 0

    def tell(method: str, verdict: Verdict) -> None:
        nonlocal failed
        failed += not verdict.passed
        print(
            f"{method:>14}  {verdict.name:<26} {'ok' if verdict.passed else 'FAILED':<7} {verdict.detail}", flush=True
        )

    found = [adds_up(text, a, bench.tokenizer.decode) for text, a in zip(texts, articles, strict=True)]
    wrong = next((v for v in found if not v.passed), None)
    words, n_bytes = sum(a.n_words for a in articles), sum(a.n_bytes for a in articles)
    tell("text", wrong or found[0]._replace(detail=f"{len(found)} articles, {words:,} words, {n_bytes:,} bytes"))
    first, later = (excerpt(articles[i], recipe.read.segment, SEGMENTS) for i in (0, -1))
    for name in methods:
        for verdict in audit(
            partial(bench.method, name), first, later, bench.tokenizer.eos_id, bench.tokenizer.vocab_size
        ):
            tell(name, verdict)
    if failed:
        raise InputError(f"{failed} checks of {bench.run.path} failed: its figures cannot be trusted")
    print(f"{len(methods)} methods, every check passed")
