"""Figures: numbers behind them, looks that survive a page, names that try to break out."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from dynlm.report import plots
from dynlm.report.svg import INK, draw_svg

NAMES = ("sgd", "rms", "gated")
ARTICLE_T = np.repeat(np.arange(10), 50)
GAINS = {name: np.linspace(-0.1, 0.1 * (i + 1), 500) for i, name in enumerate(NAMES)}
PER_ARTICLE = {name: gain.reshape(10, 50).mean(1) for name, gain in GAINS.items()}
HOSTILE = ("_hidden", "</text><script>alert(1)</script>", "$x^2$ 100% \x00\ud800", "日本", "n" * 99)


def bins(*names: str) -> dict[str, list[dict[str, object]]]:
    entries = [
        {"from": 0, "to": 32, "gain": 0.0, "ci95": [-0.1, 0.1]},
        {"from": 32, "to": 64, "gain": 0.2, "ci95": [0.2, 0.2]},
        {"from": 64, "to": 96, "gain": None, "ci95": None},
    ]
    return dict.fromkeys(names, entries)


def figures(names: tuple[str, ...] = NAMES) -> list[str]:
    gains = dict.fromkeys(names, GAINS["rms"])
    per_article = dict.fromkeys(names, PER_ARTICLE["rms"])
    return [
        plots.gain_by_position(bins(*names)),
        plots.gain_per_article(per_article),
        plots.running_gain(gains, ARTICLE_T),
    ]


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter("text")]


@pytest.mark.parametrize("svg", figures())
def test_figure_is_one_bare_element_in_the_colours_of_the_page(svg: str) -> None:
    assert svg.startswith("<svg ")
    assert svg.rstrip().endswith("</svg>")
    assert not re.search(r"<\?xml|<!DOCTYPE|<!--|<metadata|<style|xmlns|xlink|https?:", svg)
    assert "currentColor" in svg
    assert INK not in svg
    assert "#ffffff" not in svg  # no background of its own
    assert 'role="img"' in svg
    assert set(NAMES) <= set(texts(svg))


def test_ids_differ_between_figures_and_references_resolve() -> None:
    ids = [found for svg in figures() for found in re.findall(r'\bid="([^"]*)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in figures():
        used = re.findall(r'(?:url\(|href=")#([^)"]*)', svg)
        assert used
        assert set(used) <= set(re.findall(r'\bid="([^"]*)"', svg))


def test_methods_differ_by_colour_and_by_marker() -> None:
    looks = plots._looks(dict.fromkeys("abcdefghij"))
    assert len(set(looks.values())) == 10
    assert len({marker for _, marker in looks.values()}) == 10


def test_figures_ignore_the_users_matplotlib_settings() -> None:
    before = figures()
    with matplotlib.rc_context(
        {"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path", "svg.hashsalt": None}
    ):
        assert figures() == before
        assert matplotlib.rcParams["font.size"] == 30


def test_hostile_names_stay_text() -> None:
    for svg in figures(HOSTILE):
        assert "<script" not in svg
        drawn = texts(svg)
        assert "_hidden" in drawn
        assert "</text><script>alert(1)</sc…" in drawn
        assert "$x^2$ 100% ··" in drawn
        assert "n" * 27 + "…" in drawn
        svg.encode("utf-8")


def test_position_axis_is_labelled_with_the_edges_of_the_bins() -> None:
    drawn = texts(plots.gain_by_position(bins("rms")))
    assert [text for text in drawn if text in ("0", "32", "64", "96")] == ["0", "32", "64", "96"]


def test_figures_without_bins_or_with_one_article() -> None:
    assert plots.gain_by_position({"rms": []}).startswith("<svg")
    alone = texts(plots.gain_per_article({"rms": np.array([0.1])}))
    assert alone[: alone.index("articles, by the gain of rms")] == ["1"]
    drawn = texts(plots.running_gain({"rms": np.array([0.1])}, np.array([0])))
    assert "A" in drawn
    assert "B" not in drawn


def test_running_gain_shows_eight_articles_with_letters() -> None:
    drawn = texts(plots.running_gain(GAINS, ARTICLE_T))
    assert [text for text in drawn if text in set("ABCDEFGHIJ")] == list("ABCDEFGH")


def test_running_gain_has_a_bounded_number_of_points() -> None:
    many = 100_000
    svg = plots.running_gain({"rms": np.sin(np.arange(many))}, np.arange(many) // 20_000)
    assert svg.count("L ") < 1.5 * plots.POINTS


def test_article_spans_follow_reading_order() -> None:
    assert plots.article_spans(np.array([3, 3, 0, 1, 1, 1])) == [(0, 2), (2, 3), (3, 6)]
    assert plots.article_spans(np.array([0])) == [(0, 1)]


@pytest.mark.parametrize("window", [1, 4, 5, 50])
def test_moving_average_is_the_mean_of_what_exists(window: int) -> None:
    values = np.random.default_rng(0).normal(size=20)
    expected = [values[max(0, i - window // 2) : i + window // 2 + 1].mean() for i in range(20)]
    np.testing.assert_allclose(plots.moving_average(values, window), expected)


def test_moving_average_keeps_a_constant() -> None:
    np.testing.assert_allclose(plots.moving_average(np.full(7, 0.3), 5), 0.3)


def test_smoothing_window_grows_with_what_is_shown() -> None:
    assert plots.smoothing_window(np.zeros(10, dtype=np.int64)) == 16
    assert plots.smoothing_window(np.zeros(8000, dtype=np.int64)) == 100
    assert plots.smoothing_window(np.zeros(10**6, dtype=np.int64)) == 512


@pytest.mark.parametrize("missing", [None, [], [None, None], [0.2, 0.2]])
def test_interval_without_spread_is_none(missing: list[float | None] | None) -> None:
    assert plots.interval(missing) is None


def test_interval_keeps_its_ends() -> None:
    assert plots.interval([-0.1, 0.2]) == (-0.1, 0.2)


def test_label_is_escaped_and_references_are_prefixed() -> None:
    svg = draw_svg("fig", '"><script>', 2.0, lambda axes: axes.plot([0, 1], marker="o"))
    assert "<script>" not in svg
    assert 'aria-label="&quot;&gt;&lt;script&gt;"' in svg
    assert all(found.startswith("fig-") for found in re.findall(r'\bid="([^"]*)"', svg))
