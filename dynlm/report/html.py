"""Write the report of an evaluation: one HTML page that needs nothing but itself, and its figures as files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dynlm import provenance
from dynlm.files import Json, write_text
from dynlm.methods import STATELESS, STATIC
from dynlm.paired import bootstrap_ratio
from dynlm.provenance import Origin
from dynlm.report import charts, page, plots
from dynlm.report.curves import Validation, learning, load_curves
from dynlm.report.evaluation import Evaluation, Floats, load_evaluation
from dynlm.report.maps import Pieces, token_maps, words_again
from dynlm.report.pairing import FEWEST_ARTICLES, SIGNIFICANT, says
from dynlm.report.svg import Drawing, formats
from dynlm.report.tokens import legend
from dynlm.results import Comparison, Results, Stretch
from dynlm.runs import Run


def write_report(
    run: Run, kinds: str = "", pieces: Pieces | None = None, titles: Sequence[str] = (), vocab_size: int | None = None
) -> Path:
    """Write ``run.report`` from ``run.results`` and ``run.losses`` and return its path.

    ``kinds`` ("png,svg", "pdf") asks for the figures as files too, in ``run.figures``; ``pieces`` of the run's
    tokenizer, for the maps of tokens; ``titles``, the articles to map. The same evaluation gives the same bytes.

    Raises:
        InputError: the evaluation is missing or does not fit together, an unknown format or title; an earlier report is
            left as it was.
    """
    wanted = formats(kinds)
    evaluation = load_evaluation(run, vocab_size)
    drawings = draw(evaluation, load_curves(run))
    maps, again = token_maps(evaluation, pieces, titles), words_again(evaluation, pieces)
    source = render(evaluation, drawings, maps, again, provenance.load(run))
    for kind in wanted:
        for drawing in drawings.values():
            drawing.save(run.figures / f"{drawing.name}.{kind}")
    write_text(run.report, source)
    return run.report


def render(
    evaluation: Evaluation,
    drawings: dict[str, Drawing],
    maps: Json | None,
    again: Json | None,
    origins: Mapping[str, Origin],
) -> str:
    """Return the page as text."""
    results, names, shown = evaluation.results, evaluation.names, evaluation.shown
    return page.render(
        "template.html.j2",
        results=results,
        methods={name: results["methods"][name] for name in names},
        kinds={name: evaluation.kind(name) for name in names},
        lower={name: _lower(results, name, STATIC) for name in names},
        headline=_headline(evaluation),
        shown=shown,
        captions=_captions(evaluation) if shown else None,
        medians={name: float(np.median(means)) for name, means in _per_article(evaluation, names).items()},
        figures=drawings,
        drawn_gates=_drawn_gates(evaluation),
        gate_means=charts.gate_means(evaluation.gates, evaluation.adaptive[::-1]),
        gates=[name for name in evaluation.adaptive[::-1] if name in evaluation.gates],
        breakdowns=evaluation.breakdowns,
        cut=charts.is_cut(evaluation.breakdowns, shown),
        comparisons=[_comparison(results, comparison) for comparison in results.get("comparisons", [])],
        has_cache=any(results["methods"][name]["cache"] for name in names),
        fewest=FEWEST_ARTICLES,
        maps=maps,
        again=again,
        origins=origins,
        levels=legend(),
    )


def draw(evaluation: Evaluation, curves: Mapping[str, Sequence[Validation]]) -> dict[str, Drawing]:
    """Return the figures that this evaluation and these learning curves have data for, by name."""
    drawings = [learning(curves)] if curves else []
    drawings += _gains(evaluation) if evaluation.shown else []
    return {drawing.name: drawing for drawing in drawings}


def _gains(evaluation: Evaluation) -> list[Drawing]:
    """Return the figures of the methods that learn."""
    shown, breakdowns, methods = evaluation.shown, evaluation.breakdowns, evaluation.results["methods"]
    bins = {name: methods[name].get("gain_by_position", []) for name in shown}
    titles = [evaluation.titles[article] for article in np.unique(evaluation.article_T)]
    drawings = [
        plots.headline({name: methods[name] for name in evaluation.adaptive}, shown),
        plots.stream(_memories(evaluation), evaluation.article_T, shown, evaluation.titles),
        plots.by_position(bins, breakdowns.get("relative_position", []), _ahead(evaluation)),
        plots.per_article(_per_article(evaluation, shown), titles),
    ]
    if any(breakdowns.get(key) for key in charts.CLASSES):
        drawings.append(charts.words(breakdowns, shown, evaluation.results["tokens"]))
    if breakdowns.get("boundaries", {}).get("segments"):
        gated = next(((name, evaluation.gates[name]) for name in _drawn_gates(evaluation)), None)
        drawings.append(charts.boundaries(breakdowns["boundaries"], shown, gated))
    if breakdowns.get("calibration"):
        drawings.append(charts.calibration(breakdowns["calibration"], shown))
    for number, name in enumerate(_drawn_gates(evaluation)):
        drawings.append(charts.gates(name, number, evaluation.gates[name], evaluation.results["segment"]))
    return drawings


def _pair(evaluation: Evaluation) -> tuple[str, str] | None:
    """Return the two methods that are compared along the article: the best learned and the best hand-made rule, or else
    the best two methods; None where there are no two."""
    learned, hand_made = evaluation.best("learned", alone=True), evaluation.best("hand-made", alone=True)
    if learned and hand_made:
        return learned, hand_made
    shown = evaluation.shown
    return (shown[-1], shown[-2]) if len(shown) > 1 else None


def _ahead(evaluation: Evaluation) -> tuple[str, list[Stretch]] | None:
    """Return the paired difference of two methods in each bin of positions, as the evaluation has cut them."""
    if (pair := _pair(evaluation)) is None:
        return None
    better, other = pair
    spans = plots.article_spans(evaluation.article_T)
    difference_T = torch.from_numpy(evaluation.losses[other] - evaluation.losses[better])
    stretches: list[Stretch] = []
    for bin in evaluation.results["methods"][better].get("gain_by_position", []):
        parts = [difference_T[start + bin["from"] : min(stop, start + bin["to"])] for start, stop in spans]
        parts = [part for part in parts if len(part)]
        sums, sizes = torch.stack([part.sum() for part in parts]), torch.tensor([len(part) for part in parts])
        gain, ends = float(sums.sum() / sizes.sum()), list(bootstrap_ratio(sums, sizes))
        stretches.append({**bin, "tokens": int(sizes.sum()), "articles": len(parts), "gain": gain, "ci95": [*ends]})
    return f"{plots.short(better)} over {plots.short(other)}", stretches


def _drawn_gates(evaluation: Evaluation) -> list[str]:
    """Learned rules, the best first: the gates of a hand-made one hardly move, and a table tells them."""
    fits = (name for name in evaluation.adaptive[::-1] if evaluation.kind(name) == "learned")
    return [name for name in fits if name in evaluation.gates]


def _memories(evaluation: Evaluation) -> dict[str, dict[str, Floats]]:
    """What each level of memory saves: the hidden state against none, the learning weights against fixed ones."""
    gains = evaluation.gains
    learned, hand_made = evaluation.best("learned", alone=True), evaluation.best("hand-made", alone=True)
    rules = [name for name in evaluation.shown if name in (learned, hand_made)] or evaluation.shown[-1:]
    memories = {"medium-term memory: weights that learn": {name: gains[name] for name in rules}}
    if STATELESS in gains:
        memories = {"short-term memory: the context before a segment": {"": -gains[STATELESS]}, **memories}
    if learned and hand_made:
        memories["a learned memory: " + plots.short(learned) + " instead of " + plots.short(hand_made)] = {
            "": gains[learned] - gains[hand_made]
        }
    return memories


def _per_article(evaluation: Evaluation, names: Sequence[str]) -> dict[str, Floats]:
    """Return the mean gain of each article that was read, by method."""
    counts = np.bincount(evaluation.article_T)
    read = np.flatnonzero(counts)
    gains = evaluation.gains
    return {
        name: np.bincount(evaluation.article_T, weights=gains[name])[read] / counts[read]
        for name in names
        if name in gains
    }


def _headline(evaluation: Evaluation) -> Json:
    """Return the best method of each kind (or None), and by how much the learned one is below the hand-made one."""
    hand_made, learned = evaluation.best("hand-made"), evaluation.best("learned")
    both = hand_made is not None and learned is not None
    return {
        "hand_made": hand_made,
        "learned": learned,
        "learned_lower": _lower(evaluation.results, str(learned), str(hand_made)) if both else None,
    }


def _captions(evaluation: Evaluation) -> Json:
    """Return what the captions say. Needs at least one method beside the baselines."""
    titles, article_T = evaluation.titles, evaluation.article_T
    means = _per_article(evaluation, evaluation.shown)
    read = np.unique(article_T)
    last = means[evaluation.shown[-1]]
    low, high = int(last.argmin()), int(last.argmax())
    spans = plots.article_spans(article_T)[: len(plots.LETTERS)]
    return {
        "best": evaluation.shown[-1],
        "helped": {name: int((gain > 0).sum()) for name, gain in means.items()},
        "read": len(read),
        "most": (titles[read[high]], float(last[high])),
        "least": (titles[read[low]], float(last[low])),
        "window": plots.smoothing_window(article_T),
        "panels": list(_memories(evaluation)),
        "pair": _pair(evaluation),
        "repetition": _repetition(evaluation),
        "classified": _classified(evaluation),
        "letters": [
            (letter, titles[article_T[start]], stop - start)
            for letter, (start, stop) in zip(plots.LETTERS, spans, strict=False)
        ],
    }


def _repetition(evaluation: Evaluation) -> str:
    """Say what the best method gains or loses on later and on first occurrences of words, as its intervals allow."""
    best = evaluation.shown[-1]
    gains = {row["bin"]: row["gain"].get(best) for row in evaluation.breakdowns.get("occurrence", [])}
    parts = []
    for name, words in (
        ("later", "words that the article has used before"),
        ("first", "words used for the first time"),
    ):
        if (gain := gains.get(name)) is None:
            return ""
        mean = gain["mean"]
        verb = {"gain": "gain", "loss": "lose", "open": "show no clear change:"}[says(gain["ci95"])]
        number = page.signed(mean) if verb.endswith(":") else f"{abs(mean):.3f}"
        parts.append(f"{words} {verb} {number}")
    return f"With {best}, {parts[0]} nats per token, and {parts[1]}."


def _classified(evaluation: Evaluation) -> float:
    """Return the share of the tokens that belong to a word; the others are ends of lines."""
    words = evaluation.breakdowns.get("occurrence", [])
    return float(sum(row["tokens"] for row in words) / evaluation.results["tokens"])


def _comparison(results: Results, comparison: Comparison) -> Json:
    """A comparison with the drop in word perplexity and a verdict that interval and corrected test must share."""
    p, said = comparison.get("p_holm"), says(comparison["ci95"])
    if results["articles"] < FEWEST_ARTICLES:
        verdict = "too few articles"
    elif page.interval(comparison["ci95"]) is None or p is None:
        verdict = "no interval" if p is not None else "no test"
    else:
        verdict = "yes" if said == "gain" and p < SIGNIFICANT else "not separated"
    lower = _lower(results, comparison["better"], comparison["worse"])
    return {**comparison, "p_holm": p, "lower": lower, "verdict": verdict}


def _lower(results: Results, name: str, other: str) -> float:
    """By which fraction the word perplexity of ``name`` is below that of ``other``, from their losses."""
    methods = results["methods"]
    more = (methods[name]["nats"] - methods[other]["nats"]) / results["words"]
    return 1.0 - math.exp(min(more, 700.0))
