"""Write the report: one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from dynlm.report import plots
from dynlm.report.evaluation import STATIC, Evaluation, load_evaluation
from dynlm.runs import Json, Run, write_text

MINUS = "\N{MINUS SIGN}"
NONE = "–"


def write_report(run: Run) -> Path:
    """Write ``run.report`` from ``run.results`` and ``run.losses`` and return its path.

    The same evaluation gives the same bytes. :class:`dynlm.types.InputError` where the evaluation is missing or does
    not fit together; an earlier report is then left as it was.
    """
    page = render(load_evaluation(run))
    write_text(run.report, page)
    return run.report


def render(evaluation: Evaluation) -> str:
    """The page as text."""
    results, names = evaluation.results, evaluation.names
    environment = Environment(
        loader=PackageLoader("dynlm.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(ppl=_ppl, signed=_signed, span=_span, percent=_percent, plain=_plain)
    return environment.get_template("template.html.j2").render(
        results=results,
        methods={name: results["methods"][name] for name in names},
        kinds={name: evaluation.kind(name) for name in names},
        lower={name: _lower(results, name, STATIC) for name in names},
        headline=_headline(evaluation),
        figures=_figures(evaluation) if evaluation.gains else None,
        comparisons=[_comparison(results, comparison) for comparison in results.get("comparisons", [])],
    )


def _headline(evaluation: Evaluation) -> Json:
    """The best method of each kind (or None), and by how much the learned one is below the hand-made one."""
    hand_made, learned = evaluation.best("hand-made"), evaluation.best("learned")
    both = hand_made is not None and learned is not None
    return {
        "hand_made": hand_made,
        "learned": learned,
        "learned_lower": _lower(evaluation.results, str(learned), str(hand_made)) if both else None,
    }


def _figures(evaluation: Evaluation) -> Json:
    """The SVGs and what their captions say. Needs at least one method beside static."""
    methods, titles, article_T = evaluation.results["methods"], evaluation.titles, evaluation.article_T
    names = evaluation.names[1:]
    gains = {name: evaluation.gains[name] for name in names}
    counts = np.bincount(article_T)
    read = np.flatnonzero(counts)
    per_article = {name: np.bincount(article_T, weights=gain)[read] / counts[read] for name, gain in gains.items()}
    last = per_article[names[-1]]
    low, high = int(last.argmin()), int(last.argmax())
    bins = {name: methods[name].get("gain_by_position", []) for name in names}
    spans = plots.article_spans(article_T)[: len(plots.LETTERS)]
    return {
        "best": names[-1],
        "bins": bins,
        "by_position": plots.gain_by_position(bins),
        "per_article": plots.gain_per_article(per_article),
        "running": plots.running_gain(gains, article_T),
        "helped": {name: int((gain > 0).sum()) for name, gain in per_article.items()},
        "read": len(read),
        "most": (titles[read[high]], float(last[high])),
        "least": (titles[read[low]], float(last[low])),
        "window": plots.smoothing_window(article_T),
        "letters": [
            (letter, titles[article_T[start]], stop - start)
            for letter, (start, stop) in zip(plots.LETTERS, spans, strict=False)
        ],
    }


def _comparison(results: Json, comparison: Json) -> Json:
    """A comparison with the drop in word perplexity and whether its interval excludes zero (None: no interval)."""
    ends = plots.interval(comparison["ci95"])
    return {
        **comparison,
        "lower": _lower(results, comparison["better"], comparison["worse"]),
        "separate": None if ends is None else not ends[0] <= 0 <= ends[1],
    }


def _lower(results: Json, name: str, other: str) -> float:
    """By which fraction the word perplexity of ``name`` is below that of ``other``."""
    methods = results["methods"]
    return 1.0 - float(methods[name]["word_ppl"]) / float(methods[other]["word_ppl"])


def _ppl(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _signed(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{abs(value):.{digits}f}"
    sign = "" if float(text) == 0 else MINUS if value < 0 else "+"
    return sign + text


def _span(ci95: list[float | None] | None) -> str:
    ends = plots.interval(ci95)
    return NONE if ends is None else f"{_signed(ends[0])} to {_signed(ends[1])}"


def _percent(fraction: float) -> str:
    """``0.345`` as "34.5 % lower"; below zero it is higher."""
    return f"{abs(fraction):.1%} ".replace("%", "\N{NO-BREAK SPACE}%") + ("lower" if fraction >= 0 else "higher")


def _plain(value: Any) -> str:
    """A setting for a reader: text as it is, numbers to four digits unless whole, all else as JSON."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
