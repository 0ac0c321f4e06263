"""The page of two runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynlm import provenance
from dynlm.report import page
from dynlm.report.curves import learning, load_curves
from dynlm.report.looks import INK, METHODS
from dynlm.report.page import interval, signed, span
from dynlm.report.pairing import FEWEST_ARTICLES, Difference, SideBySide
from dynlm.report.plots import INTERVAL, points, short
from dynlm.report.svg import Drawing, Table, tell


def render_versus(both: SideBySide) -> str:
    """Return the page as text."""
    a, b = both.names
    curves = {
        f"{name}: {title}": records
        for name, run in zip(both.names, both.runs, strict=True)
        for title, records in load_curves(run).items()
    }
    return page.render(
        "versus.html.j2",
        a=a,
        b=b,
        both=both,
        results=(both.first.results, both.second.results),
        paths=[run.path for run in both.runs],
        best=both.differences[0],
        headline=_headline(both),
        differences=[(called(row), row, _better(row, a, b)) for row in both.differences],
        fewest=FEWEST_ARTICLES,
        difference=differences(both),
        per_article=per_article(both.differences[0], [article.title for article in both.shared], a, b),
        learning=learning(curves) if curves else None,
        origins=[provenance.load(run) for run in both.runs],
    )


def called(row: Difference) -> str:
    """Return what is compared, the second run's method first."""
    return row.first if row.first == row.second else f"{row.second} over {row.first}"


def _headline(both: SideBySide) -> str:
    """Say in a sentence how the best method of each run compare, as far as the figures allow."""
    row, (a, b) = both.differences[0], both.names
    first, second = f"{row.first} of {a}", f"{row.second} of {b}"
    size = f"{abs(row.gain):.3f} nats per token"
    low, high = sorted(abs(end) for end in interval(row.ci95) or (0.0, 0.0))
    told = f" (95 % interval {low:.3f} to {high:.3f})"  # said of a verdict alone, where both ends have one sign
    if row.verdict == "second":
        return f"{second} is better than {first} by {size}{told}."
    if row.verdict == "first":
        return f"{first} is better than {second} by {size}{told}."
    if row.verdict == "equal":
        return f"{second} and {first} have the same losses."
    few = row.verdict == "too few articles"
    why = "there are too few articles to tell them apart" if few else "that is not separated from zero"
    direction = "below" if row.gain > 0 else "above"
    return f"The loss of {second} is {size} {direction} that of {first}, but {why}."


def _better(row: Difference, a: str, b: str) -> str:
    return {"first": f"{a} is better", "second": f"{b} is better"}.get(row.verdict, row.verdict)


def differences(both: SideBySide) -> Drawing:
    """Draw the paired difference of each method with its interval."""
    rows = both.differences[::-1]

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        points(axes, {called(row): (row.gain, row.ci95) for row in rows}, {})
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.axvline(0, color=INK, linewidth=1.0)
        axes.set_xlabel(f"nats per token by which {short(both.names[1])} is better")

    told = [(called(row), signed(row.gain, 4), span(row.ci95, 4), f"{row.p_holm:.2g}") for row in both.differences]
    numbers = Table(("method", "nats per token", INTERVAL, "p, corrected"), told)
    return Drawing("difference", "Paired difference of each method", 0.9 + 0.27 * len(rows), paint, numbers=numbers)


def per_article(row: Difference, titles: Sequence[str], a: str, b: str) -> Drawing:
    """Draw the difference on each article, rising."""
    order, gains = np.argsort(row.gains, kind="stable"), row.gains
    colour, _, marker = METHODS[0]

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        axes.grid(visible=False, axis="x")
        heights = [gains[i] for i in order]
        (marks,) = axes.plot(range(1, len(order) + 1), heights, color=colour, marker=marker, linestyle="none")
        tell(marks, [f"{titles[i]}: {signed(gains[i])}" for i in order])
        axes.set_xlim(0.5, len(order) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.axhline(0, color=INK, linewidth=1.0)
        axes.set_xlabel("articles, by the difference")
        axes.set_ylabel(f"nats per token, {short(b)} better above 0")

    rows = [(titles[i], signed(gains[i])) for i in order[::-1]]
    label = f"Difference between {short(a)} and {short(b)} on each article"
    return Drawing("articles", label, 3.2, paint, numbers=Table(("article", "nats per token"), rows))
