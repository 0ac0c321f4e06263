"""The figures of the breakdowns (dynlm.evaluation.breakdowns): kinds of words, switches, calibration, gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dynlm.methods import STATIC
from dynlm.report.evaluation import Floats, GateCurves
from dynlm.report.looks import DASHES, INK, METHODS, looks
from dynlm.report.page import interval, plain, signed, span
from dynlm.report.plots import (
    GAIN,
    LETTERS,
    add_legend,
    articles,
    band,
    grid,
    legend,
    point,
    points,
    short,
    smoothed,
    spoken,
)
from dynlm.report.svg import Drawing, Table
from dynlm.results import Boundaries, Breakdowns, Calibration, ClassName, Gain, Interval, Row, Switch

CLASSES: dict[ClassName, str] = {
    "occurrence": "occurrence of the word in its article",
    "vocabulary": "kind of word",
    "train_frequency": "times the word is in the training text",
}
"""breakdowns of words, and the titles of their panels"""
SHUT = 1e-7  # a gate that lets less than this through
TENSORS = 6  # lines a panel: more do not tell apart
TENSOR_NAMES = {
    "embedding.weight": "embedding",
    "weight_ih": "input weights",
    "weight_hh": "recurrent weights",
    "lm_head.bias": "output bias",
}
GATES = (
    ("COPY", "share of a weight that stays"),
    ("UPDATE", "move by a typical gradient, × its mean"),
    ("FLUSH", "pull towards the trained weight"),
)


def words(breakdowns: Breakdowns, names: Sequence[str], tokens: int) -> Drawing:
    """Draw the gain by class of word: a row per class, with its share of all ``tokens`` read, a marker per method."""
    tables = {title: breakdowns[key] for key, title in CLASSES.items() if breakdowns.get(key)}
    rows, limits = [len(table) for table in tables.values()], scale(breakdowns, names)

    def paint(figure: Figure, narrow: bool) -> None:
        heights = [count + 0.8 for count in rows]
        panels = figure.subplots(len(tables), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
        panels[0].set_xlim(limits)
        for axes, (title, table) in zip(panels, tables.items(), strict=True):
            _classes(axes, table, names, tokens)
            axes.tick_params(labelbottom=True)
            axes.set_title(title)
        panels[-1].set_xlabel(GAIN)
        legend(figure, names, narrow, line=False)

    rows_told = [
        (f"{row['bin']}, {title}", plain(row["tokens"]), *(gain_told(row["gain"].get(name)) for name in names[::-1]))
        for title, table in tables.items()
        for row in table
    ]
    numbers = Table(("class", "tokens", *names[::-1]), rows_told)
    height = 0.9 + 0.55 * len(tables) + sum(rows) * (0.14 + 0.085 * len(names))
    label = f"Gain over static by class of word for {spoken(names)}"
    return Drawing("words", label, height, paint, numbers=numbers)


def scale(breakdowns: Breakdowns, names: Sequence[str]) -> tuple[float, float]:
    """Return the ends of the one scale of all classes: those of the means, with room for intervals about as wide.

    One wide interval of a rare class would otherwise press all others together.
    """
    gains = _gains(breakdowns, names)
    means = [0.0, *(gain["mean"] for gain in gains)]
    ends = [end for gain in gains for end in interval(gain["ci95"]) or ()]
    room = 0.5 * (max(means) - min(means)) or 1.0
    low = max(min([*means, *ends]), min(means) - room)
    high = min(max([*means, *ends]), max(means) + room)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def is_cut(breakdowns: Breakdowns, names: Sequence[str]) -> bool:
    """Return whether an interval goes beyond the scale."""
    low, high = scale(breakdowns, names)
    ends = (interval(gain["ci95"]) for gain in _gains(breakdowns, names))
    return any(found is not None and (found[0] < low or found[1] > high) for found in ends)


def _gains(breakdowns: Breakdowns, names: Sequence[str]) -> list[Gain]:
    """Return the gains of all classes of words."""
    rows = [row for key in CLASSES for row in breakdowns.get(key, [])]
    return [row["gain"][name] for row in rows for name in names if name in row["gain"]]


def gain_told(gain: Gain | None) -> str:
    """Return a mean with its interval."""
    return "–" if gain is None else f"{signed(gain['mean'])} ({span(gain['ci95'])})"


def _classes(axes: Axes, table: Sequence[Row], names: Sequence[str], tokens: int) -> None:
    """Draw one panel: classes from top to bottom, with their shares of all tokens read."""
    axes.grid(visible=False, axis="y")
    step = 0.7 / max(1, len(names))
    for place, row in enumerate(table):
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color=INK, alpha=0.05, linewidth=0)
        for k, (name, look) in enumerate(looks(names).items()):
            gain = row["gain"].get(name)
            if gain is not None:
                y = place - (k - (len(names) - 1) / 2) * step
                point(axes, gain["mean"], y, gain["ci95"], look, f"{row['bin']}, {name}")
                _arrows(axes, y, gain["ci95"], look[0])
    axes.set_yticks(range(len(table)), [f"{row['bin']}, {_share(row['tokens'] / tokens)}" for row in table])
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.axvline(0, color=INK, linewidth=1.0)


def _arrows(axes: Axes, y: float, ci95: Interval, colour: str) -> None:
    """Draw an arrow where an interval goes on beyond the axes."""
    low, high = axes.get_xlim()
    ends = interval(ci95) or (low, high)
    for place, marker, cut in ((low, "<", ends[0] < low), (high, ">", ends[1] > high)):
        if cut:
            axes.plot(place, y, color=colour, marker=marker, markersize=5, clip_on=False)


def _share(part: float) -> str:
    return f"{part:.0%}".replace("%", " %") if part >= 0.01 else f"{part:.1%}".replace("%", " %")


def boundaries(breakdown: Boundaries, names: Sequence[str], gate: tuple[str, GateCurves] | None) -> Drawing:
    """The loss just after a switch of articles, how long it takes to come down, and what the gates of a rule do there;
    static in the page's ink."""
    segments, recovery = breakdown["segments"], breakdown["recovery_segments"]
    of = {**looks(names), "static": (INK, ".")}
    acts = after_switch(gate[1], len(segments)) if gate else {}

    def paint(figure: Figure, narrow: bool) -> None:
        panels = grid(figure, 3 if acts else 2, narrow)
        for name, look in of.items():
            losses = [
                (row["segment"], row["static"] - (row["gain"][name]["mean"] if name != "static" else 0.0), None)
                for row in segments
                if name == "static" or name in row["gain"]
            ]
            band(panels[0], losses, look)
        panels[0].set_xlabel("segments since the switch")
        panels[0].set_ylabel("nats per token")
        panels[0].set_title("loss after a switch")
        times = {name: (recovery[name]["mean"], recovery[name]["ci95"]) for name in of if name in recovery}
        points(panels[1], times, of)
        panels[1].set_xlabel("segments")
        panels[1].set_title("until near its mean")
        for (title, values), line in zip(acts.items(), DASHES, strict=False):
            told = title if len(values) else f"{title} is shut"
            panels[2].plot(range(1, len(values) + 1), values, color=INK, linestyle=line, label=told)
        if acts:
            panels[2].axhline(1, color=INK, linewidth=0.8, alpha=0.45)
            panels[2].set_xlabel("segments since the switch")
            panels[2].set_title("gates after a switch")
            panels[2].set_ylabel("× their mean")
            panels[2].legend(frameon=False)
        legend(figure, list(of), narrow, of=of)

    known = [name for name in of if name in recovery]
    rows = [
        (str(row["segment"]), *(_loss(row, name) for name in known), *_acting(acts, k))
        for k, row in enumerate(segments)
    ]
    near = [f"{recovery[name]['mean']:.1f} ({_ends(recovery[name]['ci95'])})" for name in known]
    rows.append(("segments until near its mean", *near, *("" for _ in acts)))
    numbers = Table(("segment since the switch", *known, *(f"{title}, × its mean" for title in acts)), rows)
    label = f"Loss after a switch of articles for {spoken(list(of))}"
    return Drawing("boundaries", label, 3.3, paint, 8.0 if acts else 5.6, numbers)


def _loss(row: Switch, name: str) -> str:
    """Return the loss of a method in a segment, in nats per token."""
    if name != STATIC and name not in row["gain"]:
        return "–"
    return f"{row['static'] - (row['gain'][name]['mean'] if name != STATIC else 0.0):.3f}"


def _acting(acts: Mapping[str, Floats], k: int) -> list[str]:
    return [f"{values[k]:.3g}" if k < len(values) else "–" for values in acts.values()]


def _ends(ci95: Interval) -> str:
    ends = interval(ci95)
    return "–" if ends is None else f"{ends[0]:.1f} to {ends[1]:.1f}"


def after_switch(gate: GateCurves, count: int) -> dict[str, Floats]:
    """UPDATE and FLUSH at each of the first ``count`` updates after a switch, over their means, all weights counted;
    empty for a gate that is shut."""
    starts = np.cumsum([0, *gate.updates])[1:-1]  # of all articles but the first
    ends = starts + np.array(gate.updates[1:])
    share_N = np.array(gate.weights, dtype=float) / sum(gate.weights)
    acts = {}
    for (title, _), values_UN in list(zip(GATES, gate.values_3UN, strict=True))[1:]:
        value_U = values_UN @ share_N
        rows = [value_U[start : min(start + count, end)] for start, end in zip(starts, ends, strict=True)]
        at = [np.mean([row[k] for row in rows if len(row) > k]) for k in range(max(map(len, rows), default=0))]
        mean = value_U.mean()
        acts[title] = np.array(at) / mean if abs(mean) > SHUT else np.array([])
    return acts if len(gate.updates) > 1 else {}


def calibration(breakdown: Mapping[str, Calibration], names: Sequence[str]) -> Drawing:
    """Return how far the share of correct top tokens is from their probability, by probability and in all."""
    of = {**looks(names), "static": (INK, ".")}
    known = [name for name in of if name in breakdown]

    def paint(figure: Figure, narrow: bool) -> None:
        left, right = grid(figure, 2, narrow)
        for name in known:
            rows = [(b["confidence"], b["accuracy"] - b["confidence"], None) for b in breakdown[name]["bins"]]
            band(left, rows, of[name])
        left.axhline(0, color=INK, linewidth=1.0)
        left.set_xlim(0, 1)
        left.set_xlabel("probability of the most probable token")
        left.set_ylabel("share that is right − probability")
        left.set_title("too cautious above zero, too sure below")
        points(right, {name: (breakdown[name]["ece"], breakdown[name]["ci95"]) for name in known}, of)
        right.set_xlim(left=0)
        right.set_xlabel("expected calibration error")
        right.set_title("error in all")
        legend(figure, known, narrow, of=of)

    rows = [
        (
            name,
            f"{b['from']:.2f} to {b['to']:.2f}",
            plain(b["tokens"]),
            f"{b['confidence']:.3f}",
            f"{b['accuracy']:.3f}",
        )
        for name in known
        for b in breakdown[name]["bins"]
    ]
    rows += [
        (name, "error in all", "", "", f"{breakdown[name]['ece']:.4f} ({span(breakdown[name]['ci95'], 4)})")
        for name in known
    ]
    numbers = Table(("method", "probability", "tokens", "its mean", "share that is right"), rows)
    return Drawing("calibration", f"Calibration of {spoken(known)}", 3.3, paint, 5.6, numbers)


def gates(name: str, number: int, gate: GateCurves, segment: int) -> Drawing:
    """COPY, UPDATE and FLUSH along the first articles, a line for each of the largest tensors."""
    order = sorted(range(len(gate.tensors)), key=lambda i: -gate.weights[i])[:TENSORS]
    ends = np.cumsum(gate.updates[: len(LETTERS)]).tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    window = max(3, ends[-1] // 80)
    colours, dashes = [colour for colour, _, _ in METHODS], [*DASHES, *DASHES]

    def paint(figure: Figure, narrow: bool) -> None:
        panels = list(figure.subplots(3, 1, sharex=True))
        for axes, values_UN, (title, unit) in zip(panels, gate.values_3UN, GATES, strict=True):
            scale_N = values_UN.mean(0) if title == "UPDATE" else np.ones(len(gate.tensors))
            scale_N[np.abs(scale_N) < 1e-30] = 1.0
            for line, tensor in enumerate(order):
                x, y = smoothed(values_UN[:, tensor] / scale_N[tensor], spans, window)
                axes.plot(segment * np.array(x), y, color=colours[line], linestyle=dashes[line], linewidth=1.3)
            axes.set_title(f"{title}: {unit}", pad=16 if axes is panels[0] else 6)
            axes.grid(visible=False, axis="x")
            axes.ticklabel_format(axis="y", useOffset=False)
        articles(panels, [(segment * a, segment * b) for a, b in spans], segment * ends[-1])
        updates_N = gate.values_3UN[1].mean(0)
        handles = [Line2D([], [], color=colours[line], linestyle=dashes[line]) for line in range(len(order))]
        labels = [f"{called(gate.tensors[i])}, mean UPDATE {updates_N[i]:.1e}" for i in order]
        add_legend(figure, handles, labels, 1 if narrow else 2)

    rows = [(called(tensor), plain(gate.weights[i]), *_means(gate, i)) for i, tensor in enumerate(gate.tensors)]
    numbers = Table(("tensor", "weights", *(title for title, _ in GATES)), rows)
    label = f"Gate activity of {short(name)} along the first articles"
    return Drawing(f"gates-{number}", label, 5.6, paint, 6.2, numbers)


def gate_means(gates: Mapping[str, GateCurves], names: Sequence[str]) -> Table:
    """Return the means of every gate of these rules, tensor by tensor."""
    rows = [
        (name, called(tensor), plain(gate.weights[i]), *_means(gate, i))
        for name in names
        if (gate := gates.get(name))
        for i, tensor in enumerate(gate.tensors)
    ]
    return Table(("rule", "tensor", "weights", *(title for title, _ in GATES)), rows)


def _means(gate: GateCurves, tensor: int) -> list[str]:
    copy, *acts = gate.values_3UN[:, :, tensor].mean(1)
    return [f"{copy:.5f}", *(f"{value:.3g}" for value in acts)]


def called(tensor: str) -> str:
    """Return what a tensor is, before its name, where the name is one of dynlm's own LSTM."""
    what = next((text for end, text in TENSOR_NAMES.items() if tensor.endswith(end)), None)
    return f"{what} ({short(tensor)})" if what else short(tensor)
