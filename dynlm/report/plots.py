"""The three figures of the report, as SVG strings. Gains are nats a token against static; above zero is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dynlm.report.evaluation import Floats, Ints
from dynlm.report.svg import INK, draw_svg
from dynlm.runs import Json

# Okabe & Ito's colour-blind safe palette without its yellow (unreadable on white) and with black as the page's ink.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
GAIN = "gain over static (nats per token)"
LETTERS = "ABCDEFGH"
POINTS = 800  # points drawn a line in the running figure: finer than a screen shows


def gain_by_position(bins: Mapping[str, Sequence[Json]]) -> str:
    """Figure 1: mean gain by position in the article; ``bins`` is each method's ``gain_by_position``.

    The bins stand at equal distances, so that an axis of doubling bins reads as a logarithmic one.
    """
    starts = sorted({int(entry["from"]) for entries in bins.values() for entry in entries})
    last = max((int(entry["to"]) for entries in bins.values() for entry in entries), default=0)
    place = {start: index + 0.5 for index, start in enumerate(starts)}

    def paint(axes: Axes) -> None:
        for name, (colour, marker) in _looks(bins).items():
            entries = [entry for entry in bins[name] if entry["gain"] is not None]
            axes.plot(
                [place[entry["from"]] for entry in entries],
                [entry["gain"] for entry in entries],
                color=colour, marker=marker, markersize=5, linewidth=1.5,
            )  # fmt: skip
            known = [(place[entry["from"]], *ci) for entry in entries if (ci := interval(entry["ci95"]))]
            if known:
                x, low, high = zip(*known, strict=True)
                axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
        edges = [*starts, last]
        every = -(-len(edges) // 14)
        axes.set_xticks(range(len(edges))[::every], [f"{edge:,}" for edge in edges[::every]])
        axes.set_xlim(0, max(len(starts), 1))
        axes.set_xlabel("position in the article (tokens read before)")
        _finish(axes, list(bins))

    return draw_svg("by-position", f"Gain over static by position in the article for {_spoken(bins)}", 3.9, paint)


def gain_per_article(gains: Mapping[str, Floats]) -> str:
    """Figure 2: each article's mean gain, (A,) a method, all in one order: the last method's, rising."""
    order = np.argsort(list(gains.values())[-1], kind="stable")
    size = 5.5 if len(order) <= 40 else 3.0

    def paint(axes: Axes) -> None:
        axes.grid(visible=False, axis="x")
        for name, (colour, marker) in _looks(gains).items():
            axes.plot(
                np.arange(1, len(order) + 1), gains[name][order],
                color=colour, marker=marker, markersize=size, linestyle="none", alpha=0.85,
            )  # fmt: skip
        axes.set_xlim(0.5, len(order) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel(f"articles, by the gain of {_plain(list(gains)[-1])}")
        _finish(axes, list(gains), line=False)

    return draw_svg("per-article", f"Mean gain over static of each article for {_spoken(gains)}", 3.6, paint)


def running_gain(gains: Mapping[str, Floats], article_T: Ints) -> str:
    """Figure 3: the smoothed gain along the first articles of the stream; ``gains`` (T,) a method, in reading order."""
    spans = article_spans(article_T)[: len(LETTERS)]
    total = spans[-1][1]
    window = smoothing_window(article_T)
    every = max(1, total // POINTS)

    def paint(axes: Axes) -> None:
        for order, (name, (colour, marker)) in enumerate(_looks(gains).items()):
            x, y = [], []
            for start, stop in spans:  # NaN lifts the pen between articles: no average mixes two of them
                chosen = np.unique(np.append(np.arange(0, stop - start, every), stop - start - 1))
                x += [*(start + chosen), stop]
                y += [*moving_average(gains[name][start:stop], window)[chosen], np.nan]
            axes.plot(
                x, y, color=colour, linewidth=1.3,
                marker=marker, markersize=4.5, markevery=(0.02 + 0.02 * order, 0.125),
            )  # fmt: skip
        axes.grid(visible=False, axis="x")
        for (start, stop), letter in zip(spans, LETTERS, strict=False):
            axes.axvline(start, color=INK, linewidth=0.8, alpha=0.45)
            axes.text(
                (start + stop) / 2, 1.0, letter,
                transform=axes.get_xaxis_transform(), ha="center", va="bottom", weight="bold",
            )  # fmt: skip
        axes.set_xlim(0, total)
        axes.set_xlabel("tokens read")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        _finish(axes, list(gains))

    label = f"Running gain over static through the first {len(spans)} articles for {_spoken(gains)}"
    return draw_svg("running", label, 4.1, paint)


def interval(ci95: Sequence[float | None] | None) -> tuple[float, float] | None:
    """The two ends, or None where there is no spread: a bootstrap over one article knows nothing."""
    if not ci95 or ci95[0] is None or ci95[1] is None or ci95[0] == ci95[1]:
        return None
    return float(ci95[0]), float(ci95[1])


def article_spans(article_T: Ints) -> list[tuple[int, int]]:
    """(start, stop) in tokens of each article, in reading order."""
    cuts = (np.flatnonzero(np.diff(article_T)) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(article_T)], strict=True))


def smoothing_window(article_T: Ints) -> int:
    """Tokens averaged in figure 3: about an eightieth of what it shows, between 16 and 512."""
    shown = article_spans(article_T)[: len(LETTERS)][-1][1]
    return int(np.clip(shown // 80, 16, 512))


def moving_average(values_T: Floats, window: int) -> Floats:
    """Centred mean over about ``window`` values; at the ends over those that exist. (T,) to (T,)."""
    count = len(values_T)
    total = np.concatenate([[0.0], np.cumsum(values_T)])
    here = np.arange(count)
    low = np.maximum(here - window // 2, 0)
    high = np.minimum(here + window // 2 + 1, count)
    return np.asarray((total[high] - total[low]) / (high - low))


def _looks(names: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method: equal order, equal looks, in all figures."""
    return {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def _finish(axes: Axes, names: list[str], line: bool = True) -> None:
    """The zero line, the y label and the legend above the axes."""
    axes.axhline(0, color=INK, linewidth=1.0)
    axes.set_ylabel(GAIN)
    looks = _looks(dict.fromkeys(names)).values()
    handles = [Line2D([], [], color=c, marker=m, markersize=5, linestyle="-" if line else "none") for c, m in looks]
    figure = axes.figure
    legend = figure.legend(
        handles, [str(i) for i in range(len(names))],
        loc="outside upper left", ncols=min(6, len(names)), frameon=False, borderaxespad=0.2,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), names, strict=True):  # set here: a label with "_" first would be dropped
        text.set_text(_plain(name))


def _plain(name: str) -> str:
    """A method's name as a short label; what XML cannot hold becomes a dot."""
    printable = "".join(character if character.isprintable() else "·" for character in name)
    return printable if len(printable) <= 28 else printable[:27] + "…"


def _spoken(names: Mapping[str, object]) -> str:
    return ", ".join(map(_plain, names))
