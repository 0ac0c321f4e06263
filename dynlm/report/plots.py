"""The figures of the headline, the stream and the position. Gains are nats a token against static: above zero, better.

``gains`` arguments are (T,) a method in reading order, the best method last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dynlm.report.evaluation import Floats, Ints
from dynlm.report.looks import INK, looks
from dynlm.report.numbers import three
from dynlm.report.page import interval, plain, signed, span
from dynlm.report.svg import Drawing, Table, drawable, tell
from dynlm.results import Interval, MethodResult, Row, Stretch

GAIN = "gain over static (nats per token)"
INTERVAL = "95 % interval"
LETTERS = "ABCDEFGH"
POINTS = 600  # points drawn a line along the stream: finer than a screen shows


def headline(methods: Mapping[str, MethodResult], shown: Sequence[str]) -> Drawing:
    """Return the gain of every method with its interval; ``methods`` as in results.json, the best last."""

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        means = {name: (method["gain_nats_per_token"], method["gain_ci95"]) for name, method in methods.items()}
        points(axes, means, looks(shown))
        axes.set_ylim(-0.6, len(methods) - 0.4)
        axes.axvline(0, color=INK, linewidth=1.0)
        axes.set_xlabel(GAIN)

    rows = [
        (name, signed(methods[name]["gain_nats_per_token"]), span(methods[name]["gain_ci95"]))
        for name in reversed(list(methods))
    ]
    numbers = Table(("method", "gain, nats per token", INTERVAL), rows)
    label = f"Gain over static of {spoken(methods)}"
    return Drawing("gain", label, 0.9 + 0.27 * len(methods), paint, numbers=numbers)


def by_position(
    bins: Mapping[str, Sequence[Stretch]], tenths: Sequence[Row], ahead: tuple[str, Sequence[Stretch]] | None = None
) -> Drawing:
    """Mean gain by tokens read before; ``bins`` is each method's ``gain_by_position``.

    A lone method has its intervals as a band. Bands of several would pile up and hide what pairing shows: instead, a
    second panel shows ``ahead``, what is compared and the paired difference in each bin. ``tenths``, the breakdown
    ``relative_position``, is in the table. The bins stand at equal distances, so that an axis of doubling bins reads as
    a logarithmic one.
    """
    starts = sorted({int(entry["from"]) for entries in bins.values() for entry in entries})
    last = max((int(entry["to"]) for entries in bins.values() for entry in entries), default=0)
    edges = [*starts, last]
    place = {start: index + 0.5 for index, start in enumerate(starts)}

    def paint(figure: Figure, narrow: bool) -> None:
        panels = grid(figure, 2 if ahead else 1, narrow)
        for name, look in looks(list(bins)).items():
            _stretches(panels[0], place, name, bins[name], look, banded=len(bins) == 1)
        if ahead:
            _stretches(panels[1], place, ahead[0], ahead[1], (INK, "."), banded=True)
            panels[1].set_title(ahead[0])
        every = -(-len(edges) // (7 if narrow or ahead else 14))
        for axes in panels:
            axes.axhline(0, color=INK, linewidth=1.0)
            axes.set_xticks(range(len(edges))[::every], [_thousands(edge) for edge in edges[::every]])
            axes.set_xlim(0, max(len(starts), 1))
            axes.set_xlabel("tokens of the article read before")
            axes.set_ylabel(GAIN if axes is panels[0] else "nats per token")
        legend(figure, list(bins), narrow)

    rows = [
        (
            name,
            _told(entry),
            signed(entry["gain"]),
            span(entry["ci95"]),
            plain(entry["tokens"]),
            plain(entry["articles"]),
        )
        for name, entries in [*list(bins.items())[::-1], *([ahead] if ahead else [])]
        for entry in entries
    ]
    for name in list(bins)[::-1]:
        for row in tenths:
            if (gain := row["gain"].get(name)) is not None:
                counts = plain(row["tokens"]), plain(row["articles"])
                rows.append((name, f"{row['bin']} of the article", signed(gain["mean"]), span(gain["ci95"]), *counts))
    numbers = Table(("method", "read before", "gain", INTERVAL, "tokens", "articles"), rows)
    label = f"Gain over static by position in the article for {spoken(bins)}"
    return Drawing("by-position", label, 3.7, paint, 6.2 if ahead else 3.7, numbers)


def _stretches(
    axes: Axes,
    place: Mapping[int, float],
    name: str,
    entries: Sequence[Stretch],
    look: tuple[str, str],
    banded: bool,
) -> None:
    """Draw the gains between positions as a line."""
    known = [
        (place[int(e["from"])], e["gain"], e["ci95"] if banded else None) for e in entries if e["gain"] is not None
    ]
    tips = [f"{name}, {_told(e)} tokens read: {signed(e['gain'])}" for e in entries if e["gain"] is not None]
    band(axes, known, look, tips)


def _told(entry: Stretch) -> str:
    return f"{plain(entry['from'])} to {plain(entry['to'] - 1)}"


def per_article(gains: Mapping[str, Floats], titles: Sequence[str]) -> Drawing:
    """Return each article's mean gain, (A,) a method, all in one order: the last method's, rising."""
    order = np.argsort(list(gains.values())[-1], kind="stable")

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        axes.grid(visible=False, axis="x")
        size = 5.5 if len(order) <= (20 if narrow else 40) else 3.0
        for name, (colour, marker) in looks(list(gains)).items():
            (marks,) = axes.plot(
                np.arange(1, len(order) + 1), gains[name][order],
                color=colour, marker=marker, markersize=size, linestyle="none", alpha=0.85,
            )  # fmt: skip
            tell(marks, [f"{titles[a]}: {name} {signed(gains[name][a])}" for a in order])
        axes.set_xlim(0.5, len(order) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel(f"articles, by the gain of {short(list(gains)[-1])}")
        axes.axhline(0, color=INK, linewidth=1.0)
        axes.set_ylabel(GAIN)
        legend(figure, list(gains), narrow, line=False)

    names = list(gains)[::-1]
    rows = [(titles[a], *(signed(gains[name][a]) for name in names)) for a in order[::-1]]
    label = f"Mean gain over static of each article for {spoken(gains)}"
    return Drawing("per-article", label, 3.6, paint, numbers=Table(("article", *names), rows))


def stream(
    memories: Mapping[str, Mapping[str, Floats]], article_T: Ints, names: Sequence[str], titles: Sequence[str]
) -> Drawing:
    """Return what each level of memory takes off the loss along the first articles, one panel a level.

    ``memories``: for each panel's title the differences of instantaneous losses, (T,) nats; ``names`` are all methods
    of the page, which gives them their looks. Curves of no method ("" as name) have the ink's colour.
    """
    spans = article_spans(article_T)[: len(LETTERS)]
    total, window = spans[-1][1], smoothing_window(article_T)

    def paint(figure: Figure, narrow: bool) -> None:
        panels = list(figure.subplots(len(memories), 1, sharex=True, squeeze=False)[:, 0])
        of = looks(names)
        for axes, (title, curves) in zip(panels, memories.items(), strict=True):
            for name, values_T in curves.items():
                x, y = smoothed(values_T, spans, window)
                colour, marker = of.get(name, (INK, ""))
                axes.plot(x, y, color=colour, linewidth=1.3, marker=marker, markersize=4.5, markevery=(0.02, 0.125))
            axes.axhline(0, color=INK, linewidth=1.0)
            axes.grid(visible=False, axis="x")
            axes.set_title(title, pad=16 if axes is panels[0] else 6)
            axes.set_ylabel("nats per token")
        articles(panels, spans, total)
        legend(figure, [name for curves in memories.values() for name in curves if name in of], narrow, of=of)

    curves = {
        f"{title}: {name}" if name else title: values for title, of in memories.items() for name, values in of.items()
    }
    rows = [
        (titles[article_T[start]], *(signed(float(values_T[start:stop].mean())) for values_T in curves.values()))
        for start, stop in spans
    ]
    numbers = Table(("mean of article, nats per token", *curves), rows)
    label = f"What each level of memory saves along the first {len(spans)} articles"
    return Drawing("stream", label, 1.2 + 2.1 * len(memories), paint, numbers=numbers)


def articles(panels: Sequence[Axes], spans: Sequence[tuple[int, int]], total: int) -> None:
    """Lines where articles start, and their letters above the first panel."""
    for axes in panels:
        for start, _ in spans:
            axes.axvline(start, color=INK, linewidth=0.8, alpha=0.45)
    for (start, stop), letter in zip(spans, LETTERS, strict=False):
        panels[0].text(
            (start + stop) / 2, 1.01, letter,
            transform=panels[0].get_xaxis_transform(), ha="center", va="bottom", weight="bold",
        )  # fmt: skip
    panels[-1].set_xlim(0, total)
    panels[-1].set_xlabel("tokens read")
    panels[-1].xaxis.set_major_locator(MaxNLocator(6))
    panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def grid(figure: Figure, n: int, narrow: bool, **shared: Any) -> list[Axes]:
    """``n`` panels side by side, or one above the other where it is narrow."""
    shape = (n, 1) if narrow else (1, n)
    return list(figure.subplots(*shape, squeeze=False, **shared).flat)


def point(axes: Axes, x: float, y: float, ci95: Interval, look: tuple[str, str], tip: str) -> None:
    """A mean with the whiskers of its interval, lying."""
    colour, marker = look
    ends = interval(ci95)
    if ends is not None:
        axes.plot(ends, (y, y), color=colour, linewidth=1.6, solid_capstyle="butt")
    (mark,) = axes.plot(x, y, color=colour, marker=marker, markersize=5.5, linestyle="none")
    tell(mark, [f"{tip}: {three(x)}" + (f" ({three(ends[0])} to {three(ends[1])})" if ends else "")])


def points(axes: Axes, means: Mapping[str, tuple[float, Interval]], of: Mapping[str, tuple[str, str]]) -> None:
    """A row a method: (mean, interval). Methods without looks have the ink's."""
    for row, (name, (mean, ci95)) in enumerate(means.items()):
        point(axes, mean, row, ci95, of.get(name, (INK, ".")), name)
    axes.set_yticks(range(len(means)), [short(name) for name in means])
    axes.grid(visible=False, axis="y")


def band(
    axes: Axes,
    means: Sequence[tuple[float, float, Sequence[float | None] | None]],
    look: tuple[str, str],
    tips: Sequence[str] = (),
) -> None:
    """Means (x, y, interval) as a line, with the intervals as a band; a tip a mean."""
    colour, marker = look
    (line,) = axes.plot(
        [x for x, _, _ in means], [y for _, y, _ in means],
        color=colour, marker=marker, markersize=4.5, linewidth=1.5,
    )  # fmt: skip
    tell(line, tips)
    known = [(x, *ends) for x, _, ci95 in means if (ends := interval(ci95))]
    if known:
        x, low, high = zip(*known, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)


def legend(
    figure: Figure,
    names: Sequence[str],
    narrow: bool,
    line: bool = True,
    of: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Above the axes, in the order of the names, the best first."""
    of = of or looks(names)
    names = list(dict.fromkeys(names))[::-1]
    if not names:
        return
    handles = [
        Line2D([], [], color=of[n][0], marker=of[n][1], markersize=5, linestyle="-" if line else "none") for n in names
    ]
    add_legend(figure, handles, [short(name) for name in names], min(3 if narrow else 6, len(names)))


def add_legend(figure: Figure, handles: Sequence[Line2D], labels: Sequence[str], columns: int) -> None:
    """Handles with labels, above the axes."""
    drawn = figure.legend(
        handles, [str(i) for i in range(len(labels))],
        loc="outside upper left", ncols=columns, frameon=False, borderaxespad=0.2,
    )  # fmt: skip
    for text, label in zip(drawn.get_texts(), labels, strict=True):  # set here: one with "_" first would be dropped
        text.set_text(label)


def article_spans(article_T: Ints) -> list[tuple[int, int]]:
    """Return (start, stop) in tokens of each article, in reading order."""
    cuts = (np.flatnonzero(np.diff(article_T)) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(article_T)], strict=True))


def smoothing_window(article_T: Ints) -> int:
    """Tokens averaged along the stream: about an eightieth of what is shown, between 16 and 512."""
    shown = article_spans(article_T)[: len(LETTERS)][-1][1]
    return int(np.clip(shown // 80, 16, 512))


def smoothed(values_T: Floats, spans: Sequence[tuple[int, int]], window: int) -> tuple[list[float], list[float]]:
    """Return a running mean along the articles as a line (places, values) of a bounded number of points.

    NaN lifts the pen between articles: no average mixes two of them.
    """
    x, y, every = list[float](), list[float](), max(1, spans[-1][1] // POINTS)
    for start, stop in spans:
        chosen = np.unique(np.append(np.arange(0, stop - start, every), stop - start - 1))
        x += [*(start + chosen), stop]
        y += [*moving_average(values_T[start:stop], window)[chosen], np.nan]
    return x, y


def moving_average(values_T: Floats, window: int) -> Floats:
    """Centred mean over about ``window`` values; at the ends over those that exist. (T,) to (T,)."""
    count = len(values_T)
    total = np.concatenate([[0.0], np.cumsum(values_T)])
    here = np.arange(count)
    low = np.maximum(here - window // 2, 0)
    high = np.minimum(here + window // 2 + 1, count)
    return np.asarray((total[high] - total[low]) / (high - low))


def short(name: str) -> str:
    """Return a method's name as a short label; what XML cannot hold becomes a dot."""
    text = drawable(name)
    return text if len(text) <= 28 else text[:27] + "…"


def spoken(names: Sequence[str] | Mapping[str, object]) -> str:
    """Return names for those who do not see the figure."""
    return ", ".join(map(short, names))


def _thousands(edge: int) -> str:
    """1024 as "1k": labels of doubling bins have little room."""
    return f"{edge / 1024:.0f}k" if edge >= 1024 else str(edge)
