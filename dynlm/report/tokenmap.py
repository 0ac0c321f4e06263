"""The page of ``dynlm read --html``: every token of a text, coloured by what learning while reading gained on it."""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes

from dynlm.report.evaluation import Floats
from dynlm.report.html import _plain, _ppl, _signed
from dynlm.report.plots import GAIN
from dynlm.report.shades import BETTER, WORSE, label, shade
from dynlm.report.svg import INK, draw_svg
from dynlm.runs import Json, write_text

BINS = 100  # points of the figure
BIN_TOKENS = 32  # at the least
EXTREMES = 10  # words in each of the two lists
SCRIPT = """
const map = document.getElementById("map"), panel = document.getElementById("panel");
let at = null, all = null;
const way = (name, nats) => name + " " + nats.toFixed(3) + " nats = " + (nats / Math.LN2).toFixed(3) + " bits, p = " +
  Math.exp(-nats).toPrecision(3);
function show(token) {
  if (at) at.classList.remove("at");
  at = token;
  at.classList.add("at");
  const s = +at.dataset.s, a = +at.dataset.a;
  panel.textContent = "“" + at.textContent.replace("\\n", "↵") + "”: " + way("static", s) + "; " + way("adapted", a) +
    "; gain " + (s - a < 0 ? "−" : "+") + Math.abs(s - a).toFixed(3) + " nats";
  panel.hidden = false;
}
function over(event) {
  const token = event.target.closest("[data-s]");
  if (token) show(token);
}
map.classList.add("js");
map.addEventListener("pointerover", over);
map.addEventListener("click", over);
map.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step) return;
  event.preventDefault();
  all = all || [...map.querySelectorAll("[data-s]")];
  const next = all[at ? all.indexOf(at) + step : 0];
  if (next) { show(next); next.scrollIntoView({block: "nearest"}); }
});
"""


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
    """articles, tokens, words, bytes, static and adapted nats, their word perplexities, seconds"""
    settings: Mapping[str, Any]


def write_token_map(path: Path, shown: TokenMap) -> None:
    """Write the page to ``path``; the same numbers give the same bytes."""
    write_text(path, render(shown))


def render(shown: TokenMap) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("dynlm.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(ppl=_perplexity, signed=_signed, plain=_plain)
    gain_T = np.asarray(shown.static_T, dtype=float) - np.asarray(shown.adapted_T, dtype=float)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return environment.get_template("tokenmap.html.j2").render(
        shown=shown,
        totals=shown.totals,
        gain=float(gain_T.mean()),
        better=float((gain_T > 0).mean()),
        figure=_figure(gain_T, [start for _, start in shown.articles]),
        extremes=_extremes(shown.texts, gain_T),
        maps=_maps(shown),
        levels=[(level, _shade_class(level), label(level)) for level in range(-4, 5)],
        script=SCRIPT,
        script_hash=f"sha256-{digest}",
    )


def _maps(shown: TokenMap) -> list[tuple[str, str]]:
    """(title, its tokens as HTML) of each article."""
    stops = [*(start for _, start in shown.articles[1:]), len(shown.texts)]
    return [
        (title, "".join(map(_token, *(of[start:stop] for of in (shown.texts, shown.static_T, shown.adapted_T)))))
        for (title, start), stop in zip(shown.articles, stops, strict=True)
    ]


def _token(text: str, static: float, adapted: float) -> str:
    kinds = (_shade_class(shade(static - adapted)), "n" if text == "\n" else "" if text else "e")
    classes = " ".join(kind for kind in kinds if kind)
    attribute = f' class="{classes}"' if classes else ""
    shown = html.escape(text, quote=False).replace("\r", "&#13;")
    return f'<span{attribute} data-s="{static:.3f}" data-a="{adapted:.3f}">{shown}</span>'


def _shade_class(level: int) -> str:
    return f"{'b' if level > 0 else 'w'}{abs(level)}" if level else ""


def _extremes(texts: Sequence[str], gain_T: Floats) -> Json:
    """The tokens that gained and lost most in all: (text, times, nats)."""
    sums: dict[str, float] = {}
    for text, gain in zip(texts, gain_T.tolist(), strict=True):
        sums[text] = sums.get(text, 0.0) + gain
    times = Counter(texts)
    order = sorted((text for text in sums if text.strip()), key=lambda text: -sums[text])
    rows = [(text.strip(), times[text], sums[text]) for text in order]
    return {
        "gained": [row for row in rows[:EXTREMES] if row[2] > 0],
        "lost": [row for row in rows[: -EXTREMES - 1 : -1] if row[2] < 0],
    }


def _figure(gain_T: Floats, starts: Sequence[int]) -> str:
    """Mean gain along the text, as an SVG."""
    width = max(BIN_TOKENS, math.ceil(len(gain_T) / BINS))
    edges = np.append(np.arange(0, len(gain_T), width), len(gain_T))
    means = np.add.reduceat(gain_T, edges[:-1]) / np.diff(edges)

    def paint(axes: Axes) -> None:
        x, y = np.repeat(edges, 2)[1:-1], np.repeat(means, 2)
        for (red, green, blue), side in ((BETTER[2], y.clip(min=0)), (WORSE[2], y.clip(max=0))):
            axes.fill_between(x, side, color=(red / 255, green / 255, blue / 255), linewidth=0)
        axes.axhline(0, color=INK, linewidth=1.0)
        for start in starts[1:] if len(starts) <= 40 else ():
            axes.axvline(start, color=INK, linewidth=0.8, alpha=0.45)
        axes.set_xlim(0, len(gain_T))
        axes.set_xlabel(f"tokens read (means over {width:,})")
        axes.set_ylabel(GAIN)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")

    return draw_svg("along", "Gain over static along the text", 2.8, paint)


def _perplexity(value: float) -> str:
    return _ppl(value) if math.isfinite(value) and value < 1e9 else "beyond 10⁹"
