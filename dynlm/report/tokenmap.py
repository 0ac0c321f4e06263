"""The page of ``dynlm read --html``: every token of a text, coloured by what learning while reading gained on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dynlm.files import Json, write_text
from dynlm.report import page
from dynlm.report.evaluation import Floats
from dynlm.report.looks import INK
from dynlm.report.numbers import SANE_PERPLEXITY
from dynlm.report.plots import GAIN
from dynlm.report.shades import LIGHT
from dynlm.report.svg import Drawing
from dynlm.report.tokens import legend, tokens
from dynlm.report.words import extremes

BINS = 100  # points of the figure
BIN_TOKENS = 32  # at the least


@dataclass(frozen=True)
class TokenMap:
    """What the page shows. Losses are nats, T tokens of all articles in reading order."""

    rule: str
    articles: Sequence[tuple[str, int]]
    """(title, number of its first token)"""
    texts: Sequence[str]
    """the stretch of text that each token stands for; some stand for none"""
    static_T: Sequence[float]
    adapted_T: Sequence[float]
    totals: Json
    """articles, tokens, words, lines, bytes, seconds; nats_per_token, bits_per_byte and word_perplexity of static and
    adapted"""
    settings: Mapping[str, Any]
    words: Sequence[Json] = ()
    """rows of :class:`dynlm.report.words.Occurrences`"""
    mean: Json | None = None
    """their mean"""
    limit: str = ""
    """why words are missing among them, if any are"""
    note: str = ""
    """a warning about the figures"""


def write_token_map(path: Path, shown: TokenMap) -> None:
    """Write the page to ``path``; the same numbers give the same bytes."""
    write_text(path, render(shown))


def render(shown: TokenMap) -> str:
    """Return the page as text."""
    gain_T = np.asarray(shown.static_T, dtype=float) - np.asarray(shown.adapted_T, dtype=float)
    perplexities = [shown.totals[name]["word_perplexity"] or math.inf for name in ("static", "adapted")]
    return page.render(
        "tokenmap.html.j2",
        shown=shown,
        totals=shown.totals,
        sane=max(perplexities) < SANE_PERPLEXITY,
        gain=float(gain_T.mean()),
        better=float((gain_T > 0).mean()),
        figure=_figure(gain_T, [start for _, start in shown.articles]).html(),
        extremes=extremes(zip(shown.texts, shown.static_T, shown.adapted_T, strict=True)),
        maps=_maps(shown),
        levels=legend(),
    )


def _maps(shown: TokenMap) -> list[tuple[str, str]]:
    """Return (title, its tokens as HTML) of each article."""
    stops = [*(start for _, start in shown.articles[1:]), len(shown.texts)]
    maps = []
    for (title, start), stop in zip(shown.articles, stops, strict=True):
        here = slice(start, stop)
        maps.append((title, tokens(shown.texts[here], shown.static_T[here], shown.adapted_T[here])))
    return maps


def _figure(gain_T: Floats, starts: Sequence[int]) -> Drawing:
    """Mean gain along the text."""
    width = max(BIN_TOKENS, math.ceil(len(gain_T) / BINS))
    edges = np.append(np.arange(0, len(gain_T), width), len(gain_T))
    means = np.add.reduceat(gain_T, edges[:-1]) / np.diff(edges)

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        x, y = np.repeat(edges, 2)[1:-1], np.repeat(means, 2)
        for (red, green, blue), side in ((LIGHT.better[2], y.clip(min=0)), (LIGHT.worse[2], y.clip(max=0))):
            axes.fill_between(x, side, color=(red / 255, green / 255, blue / 255), linewidth=0)
        axes.axhline(0, color=INK, linewidth=1.0)
        for start in starts[1:] if len(starts) <= 40 else ():
            axes.axvline(start, color=INK, linewidth=0.8, alpha=0.45)
        axes.set_xlim(0, len(gain_T))
        axes.set_xlabel(f"tokens read (means over {width:,})")
        axes.set_ylabel(GAIN)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")

    return Drawing("along", "Gain over static along the text", 2.8, paint)
