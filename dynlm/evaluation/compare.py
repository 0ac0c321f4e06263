"""Several methods over identical tokens: results.json and the losses behind it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from dynlm.changes import changing
from dynlm.evaluation.cache import cached_name
from dynlm.evaluation.metrics import Counts, gain_by_position, holm, paired_gain, perplexities, sign_flip_p
from dynlm.evaluation.stream import Scores
from dynlm.optim.base import Rule
from dynlm.optim.library import seedless
from dynlm.runs import Json, Run, write_json, write_tensors
from dynlm.types import InputError, TokenizedArticle

SCHEMA = 2


def identify(name: str, rule: Rule) -> Json:
    """What a method is: its rule with kind and seed, the learned start that it reads from, whether it has a cache.

    Keys: ``rule``; ``kind`` ("baseline", "hand-made" or "learned": a cache beside static weights is hand-made);
    ``seed``; ``start`` (a method of ``learn-start`` or None); ``cache``.
    """
    cached = cached_name(name)
    plain, _, start = (cached or name).partition("@")
    kind = "hand-made" if cached and rule.kind == "baseline" else rule.kind
    seed = int(plain.partition("#")[2] or 0)
    return {"rule": rule.name, "kind": kind, "seed": seed, "start": start or None, "cache": cached is not None}


def summarize(
    scores: Mapping[str, Scores], settings: Mapping[str, Json], counts: Counts, *, lossless: bool = True
) -> Json:
    """The ``methods``, ``seeds`` and ``comparisons`` of results.json; ``scores`` must hold ``static``, the baseline.

    ``lossless``: the tokens spell the text, so that bits per byte mean something.
    """
    if "static" not in scores:
        raise InputError("methods lack 'static', the baseline of every gain: add it to evaluate.methods")
    baseline = scores["static"].losses
    methods: Json = {}
    for name, score in scores.items():
        gain, interval = paired_gain(baseline, score.losses)
        methods[name] = {
            **perplexities(score.nats, counts, lossless),
            "gain_nats_per_token": gain,
            "gain_ci95": list(interval),
            "tokens_per_s": counts.tokens / score.seconds,
            "gain_by_position": gain_by_position(baseline, score.losses),
            "settings": settings.get(name, {}),
        }
    return {"methods": methods, "seeds": _seeds(methods), "comparisons": _comparisons(scores, methods, counts)}


def _seeds(methods: Json) -> Json:
    """Methods that differ by their seed alone (``gated``, ``gated#1``), with mean and standard deviation."""
    groups: dict[str, list[str]] = {}
    for name in methods:
        groups.setdefault(seedless(name), []).append(name)
    seeds: Json = {}
    for base, names in groups.items():
        values = {key: [methods[name][key] for name in names] for key in ("word_ppl", "gain_nats_per_token")}
        if len(names) > 1 and None not in values["word_ppl"]:
            spread = {key: {"mean": statistics.mean(v), "sd": statistics.stdev(v)} for key, v in values.items()}
            seeds[base] = {"methods": names, **spread}
    return seeds


def _comparisons(scores: Mapping[str, Scores], methods: Json, counts: Counts) -> list[Json]:
    """Each method against the next worse one, paired over articles; p-values also as Holm corrects them."""
    order = sorted(methods, key=lambda name: methods[name]["nats"])
    rows: list[Json] = []
    for better, worse in pairwise(order):
        gain, interval = paired_gain(scores[worse].losses, scores[better].losses)
        ratio = math.exp((methods[better]["nats"] - methods[worse]["nats"]) / counts.words)  # at most 1
        rows.append(
            {
                "better": better,
                "worse": worse,
                "gain_nats_per_token": gain,
                "ci95": list(interval),
                "word_ppl_ratio": ratio,
                "p": sign_flip_p(scores[worse].nats_per_article - scores[better].nats_per_article),
            }
        )
    for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = corrected
    return rows


def write_results(run: Run, scores: Mapping[str, Scores], articles: Sequence[TokenizedArticle], results: Json) -> None:
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
        write_json(new.at(run.results), {"schema": SCHEMA, **results})
        new.remove(*run.reported(), run.parts("evaluate"))
