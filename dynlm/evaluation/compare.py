"""Several methods over identical tokens: results.json and the losses behind it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from dynlm.changes import changing
from dynlm.evaluation.metrics import Counts, gain_by_position, perplexities
from dynlm.evaluation.stream import Scores
from dynlm.files import write_tensors
from dynlm.methods import STATELESS, STATIC, Method
from dynlm.optim.base import Rule
from dynlm.optim.sharing import fingerprint
from dynlm.paired import holm, paired_gain, sign_flip_p
from dynlm.provenance import record
from dynlm.results import Comparison, Description, MethodResult, Results, Seeds, Spread, Summary, save_results
from dynlm.runs import Run
from dynlm.types import InputError, TokenizedArticle


def describe(name: str, rule: Rule, settings: Mapping[str, float]) -> Description:
    """What a method is: its rule, with its kind, seed and settings, its learned start, and whether it has a cache."""
    method = Method.parse(name)
    return {
        "rule": STATELESS if method.rule == STATELESS else rule.name,
        "kind": "learned" if method.mix else "hand-made" if method.cache and rule.kind == "baseline" else rule.kind,
        "seed": method.seed,
        "start": method.start or None,
        "cache": method.cache,
        "mix": method.mix,
        "settings": dict(settings),
        "fingerprint": fingerprint(rule) if rule.reads_gradient else None,
    }


def summarize(
    scores: Mapping[str, Scores], described: Mapping[str, Description], counts: Counts, *, lossless: bool = True
) -> Summary:
    """Return the figures of every method that ``scores`` holds; ``static`` must be among them, the baseline.

    ``lossless``: the tokens spell the text, so that bits per byte mean something.
    """
    if STATIC not in scores:
        raise InputError("methods lack 'static', the baseline of every gain: add it", setting="evaluate.methods")
    baseline = scores[STATIC].losses
    methods: dict[str, MethodResult] = {}
    for name, score in scores.items():
        gain, interval = paired_gain(baseline, score.losses)
        methods[name] = {
            **described[name],
            **perplexities(score.nats, counts, lossless),
            "gain_nats_per_token": gain,
            "gain_ci95": list(interval),
            "tokens_per_s": counts.tokens / score.seconds,
            "gain_by_position": gain_by_position(baseline, score.losses),
        }
    return {"methods": methods, "seeds": _seeds(methods), "comparisons": _comparisons(scores, methods, counts)}


def _seeds(methods: Mapping[str, MethodResult]) -> dict[str, Seeds]:
    """Methods that differ by their seed alone (``gated``, ``gated#1``), with mean and standard deviation."""
    groups: dict[str, list[str]] = {}
    for name in methods:
        groups.setdefault(str(replace(Method.parse(name), seed=0)), []).append(name)
    seeds: dict[str, Seeds] = {}
    for base, names in groups.items():
        ppl = [value for name in names if (value := methods[name]["word_ppl"]) is not None]
        if len(names) > 1 and len(ppl) == len(names):
            gains = [methods[name]["gain_nats_per_token"] for name in names]
            seeds[base] = {"methods": names, "word_ppl": _spread(ppl), "gain_nats_per_token": _spread(gains)}
    return seeds


def _spread(values: Sequence[float]) -> Spread:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values)}


def _comparisons(scores: Mapping[str, Scores], methods: Mapping[str, MethodResult], counts: Counts) -> list[Comparison]:
    """Compare each method with the next worse one, paired over articles; p-values also as Holm corrects them."""
    pairs = list(pairwise(sorted(methods, key=lambda name: methods[name]["nats"])))
    p_values = [sign_flip_p(scores[b].nats_per_article - scores[a].nats_per_article) for a, b in pairs]
    rows: list[Comparison] = []
    for (better, worse), p, corrected in zip(pairs, p_values, holm(p_values), strict=True):
        gain, interval = paired_gain(scores[worse].losses, scores[better].losses)
        rows.append(
            {
                "better": better,
                "worse": worse,
                "gain_nats_per_token": gain,
                "ci95": list(interval),
                # at most 1
                "word_ppl_ratio": math.exp((methods[better]["nats"] - methods[worse]["nats"]) / counts.words),
                "p": p,
                "p_holm": corrected,
            }
        )
    return rows


def write_results(
    run: Run, scores: Mapping[str, Scores], articles: Sequence[TokenizedArticle], results: Results
) -> None:
    """results.json and, beside it, every token with its loss under every method, and the gates of the first articles.

    losses.safetensors: "losses/METHOD" (T,) in nats; "ids", "article" and "position" in it (T,), int32; and where they
    were recorded "gates/METHOD" (3, updates, tensors), float32: COPY, UPDATE and FLUSH (dynlm.evaluation.gates). The
    report of an earlier evaluation is removed.
    """
    lengths = [len(article) for article in articles]
    tensors: dict[str, Any] = {f"losses/{name}": torch.cat(score.losses) for name, score in scores.items()}
    tensors |= {f"gates/{name}": score.gates.values_3Un for name, score in scores.items() if score.gates}
    tensors["ids"] = torch.cat([article.ids_T for article in articles]).int()
    tensors["article"] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).int()
    tensors["position"] = torch.cat([torch.arange(n) for n in lengths]).int()
    with changing(run.path) as new:
        write_tensors(new.at(run.losses), tensors)
        save_results(results, new.at(run.results))
        record(new, run, run.results)
        new.remove(*run.reported(), run.parts("evaluate"))
