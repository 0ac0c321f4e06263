"""Figures: numbers behind them, looks that survive a page, names that try to break out."""

from __future__ import annotations

import functools
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from dynlm.report import plots
from dynlm.report.charts import after_switch, calibration, gates, is_cut, scale, words
from dynlm.report.curves import ROWS, Validation, learning, load_curves
from dynlm.report.evaluation import GateCurves
from dynlm.report.looks import INK, METHODS, looks
from dynlm.report.page import interval, signed
from dynlm.report.svg import Drawing
from dynlm.runs import Run
from dynlm.types import InputError

NAMES = ("sgd", "rms", "gated")
ARTICLE_T = np.repeat(np.arange(10), 50)
TITLES = [f"Title {k}" for k in range(10)]
GAINS = {name: np.linspace(-0.1, 0.1 * (i + 1), 500) for i, name in enumerate(NAMES)}
PER_ARTICLE = {name: gain.reshape(10, 50).mean(1) for name, gain in GAINS.items()}
HOSTILE = ("_hidden", "</text><script>alert(1)</script>", "$x^2$ 100% \x00\ud800", "日本", "n" * 99)


BIN = {"from": 0.0, "to": 1.0, "tokens": 10, "confidence": 0.5, "accuracy": 0.4}
COUNTS = {"tokens": 10, "articles": 2}


def bins(*names: str) -> dict[str, list[dict[str, object]]]:
    entries = [
        {**COUNTS, "from": 0, "to": 32, "gain": 0.0, "ci95": [-0.1, 0.1]},
        {**COUNTS, "from": 32, "to": 64, "gain": 0.2, "ci95": [0.2, 0.2]},
        {**COUNTS, "from": 64, "to": 96, "gain": None, "ci95": None},
    ]
    return dict.fromkeys(names, entries)


def rows(names, *labels):
    gain = {name: {"mean": 0.1, "ci95": [0.0, 0.2]} for name in names}
    return [{**COUNTS, "bin": label, "static": 4.0, "gain": gain} for label in labels]


def drawings(names: tuple[str, ...] = NAMES) -> list[Drawing]:
    gains = dict.fromkeys(names, GAINS["rms"])
    methods = {name: {"gain_nats_per_token": 0.1, "gain_ci95": [0.0, 0.2]} for name in names}
    told = {name: {"ece": 0.1, "ci95": [0.0, 0.2], "bins": [BIN]} for name in names}
    gate = GateCurves(np.ones((3, 30, len(names))), list(names), [1] * len(names), [10, 20])
    return [
        plots.headline(methods, names),
        plots.by_position(bins(*names), rows(names, *(str(k) for k in range(10)))),
        plots.per_article(dict.fromkeys(names, PER_ARTICLE["rms"]), TITLES),
        plots.stream({"weights": gains, "more": {"": GAINS["rms"]}}, ARTICLE_T, names, TITLES),
        words({"occurrence": rows(names, "first", "later")}, names, 400),
        calibration(told, names),
        gates("gated", 0, gate, 32),
    ]


@functools.cache
def figures(names: tuple[str, ...] = NAMES) -> tuple[str, ...]:
    return tuple(drawing.svg(narrow) for drawing in drawings(names) for narrow in (False, True))


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter("text")]


def test_figures_are_bare_elements_in_the_colours_of_the_page() -> None:
    for svg in figures():
        assert svg.startswith("<svg ")
        assert svg.rstrip().endswith("</svg>")
        assert not re.search(r"<\?xml|<!DOCTYPE|<!--|<metadata|<style|xmlns|xlink|https?:", svg)
        assert "currentColor" in svg
        assert INK not in svg
        assert "#ffffff" not in svg  # no background of its own
        assert 'role="img"' in svg


def test_ids_differ_between_figures_and_references_resolve() -> None:
    ids = [found for svg in figures() for found in re.findall(r'\bid="([^"]*)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in figures():
        used = re.findall(r'(?:url\(|href=")#([^)"]*)', svg)
        assert set(used) <= set(re.findall(r'\bid="([^"]*)"', svg))


def test_methods_differ_by_colour_and_by_marker_and_the_best_is_first() -> None:
    of = looks("abcdef")
    assert len({colour for colour, _ in of.values()}) == len({marker for _, marker in of.values()}) == 6
    assert of["f"] == (METHODS[0][0], METHODS[0][2])


def test_colours_of_methods_are_the_page_s() -> None:
    svg = drawings()[0].svg()
    assert not any(light in svg for light, _, _ in METHODS)
    assert "var(--m0)" in svg


@pytest.mark.parametrize("background", [0.0, 1.0])
def test_colours_stand_out_from_the_page(background: float) -> None:
    """WCAG's contrast for graphics, 3 to 1."""
    for light, dark, _ in METHODS:
        colour = light if background else dark
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        bright, dim = max(luminance, background), min(luminance, background)
        assert (bright + 0.05) / (dim + 0.05) >= 2.9, colour


def test_figures_ignore_the_users_matplotlib_settings() -> None:
    before = drawings()[1].svg()
    with matplotlib.rc_context(
        {"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path", "svg.hashsalt": None}
    ):
        assert drawings()[1].svg() == before
        assert matplotlib.rcParams["font.size"] == 30


def test_hostile_names_stay_text() -> None:
    for svg in figures(HOSTILE):
        assert "<script" not in svg
        drawn = texts(svg)
        if "_hidden" in drawn:
            assert "</text><script>alert(1)</sc…" in drawn
            assert "$x^2$ 100% ··" in drawn
            assert "n" * 27 + "…" in drawn
        svg.encode("utf-8")


def test_position_axis_is_labelled_with_the_edges_of_the_bins() -> None:
    drawn = texts(plots.by_position(bins("rms"), []).svg())
    assert [text for text in drawn if text in ("0", "32", "64", "96")] == ["0", "32", "64", "96"]


def test_figures_without_bins_or_with_one_article() -> None:
    assert plots.by_position({"rms": []}, []).svg().startswith("<svg")
    alone = texts(plots.per_article({"rms": np.array([0.1])}, ["one"]).svg())
    assert alone[: alone.index("articles, by the gain of rms")] == ["1"]
    drawn = texts(plots.stream({"weights": {"rms": np.array([0.1])}}, np.array([0]), ["rms"], ["one"]).svg())
    assert "A" in drawn
    assert "B" not in drawn


def test_the_stream_shows_eight_articles_with_letters() -> None:
    drawn = texts(plots.stream({"weights": GAINS}, ARTICLE_T, NAMES, TITLES).svg())
    assert [text for text in drawn if text in set("ABCDEFGHIJ")] == list("ABCDEFGH")


def test_the_stream_has_a_bounded_number_of_points() -> None:
    many = 100_000
    svg = plots.stream({"weights": {"rms": np.sin(np.arange(many))}}, np.arange(many) // 20_000, ["rms"], TITLES).svg()
    assert svg.count("L ") < 1.5 * plots.POINTS


def test_gates_after_a_switch_are_means_over_articles_and_weights() -> None:
    values = np.zeros((3, 6, 2))
    values[1] = np.arange(12).reshape(6, 2)  # UPDATE; FLUSH is shut
    gate = GateCurves(values, ["a", "b"], [3, 1], [2, 3, 1])
    of_all = values[1] @ np.array([0.75, 0.25])
    expected = np.array([(of_all[2] + of_all[5]) / 2, of_all[3], of_all[4]]) / of_all.mean()
    acts = after_switch(gate, 8)
    assert list(acts) == ["UPDATE", "FLUSH"]
    assert acts["FLUSH"].size == 0
    np.testing.assert_allclose(acts["UPDATE"], expected)
    assert after_switch(gate, 2)["UPDATE"].tolist() == expected[:2].tolist()
    assert after_switch(gate._replace(updates=[6]), 8) == {}


def test_gates_have_a_bounded_number_of_points_and_lines() -> None:
    many = GateCurves(
        np.random.default_rng(0).random((3, 20_000, 9)), [f"t{i}" for i in range(9)], list(range(9)), [20_000]
    )
    svg = gates("gated", 0, many, 32).svg()
    assert svg.count("L ") < 3 * 6 * 1.2 * plots.POINTS
    drawn = [text.partition(",")[0] for text in texts(svg)]
    assert {"t8", "t3"} <= set(drawn)
    assert "t2" not in drawn  # the six largest


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
    assert interval(missing) is None


def test_interval_keeps_its_ends() -> None:
    assert interval([-0.1, 0.2]) == (-0.1, 0.2)


def test_label_is_escaped_and_references_are_prefixed() -> None:
    svg = Drawing("fig", '"><script>', 2.0, lambda figure, _: figure.add_subplot().plot([0, 1], marker="o")).svg()
    assert "<script>" not in svg
    assert 'aria-label="&quot;&gt;&lt;script&gt;"' in svg
    assert all(found.startswith("fig-") for found in re.findall(r'\bid="([^"]*)"', svg))


def test_every_figure_has_its_numbers_and_its_marks_tell_theirs() -> None:
    for drawing in drawings():
        assert drawing.numbers is not None
        assert drawing.numbers.rows
        assert {len(row) for row in drawing.numbers.rows} == {len(drawing.numbers.head)}
    tips = re.findall("<title>([^<]*)</title>", drawings()[2].svg())
    assert len(tips) == len(NAMES) * len(TITLES)
    assert f"Title 0: rms {signed(PER_ARTICLE['rms'][0])}" in tips
    assert drawings()[0].svg().count("<title>") == len(NAMES)


def test_files_have_no_tips(tmp_path: Path) -> None:
    drawings()[2].save(tmp_path / "a.svg")
    assert "Title 0" not in (tmp_path / "a.svg").read_text()


def test_a_lone_method_has_a_band_and_several_have_a_paired_difference() -> None:
    def bands(drawing: Drawing) -> int:
        return drawing.svg().count("fill-opacity: 0.1")

    assert bands(plots.by_position(bins("rms"), [])) == 1
    assert bands(plots.by_position(bins("rms", "gated"), [])) == 0
    compared = plots.by_position(bins("rms", "gated"), [], ("gated over rms", bins("x")["x"]))
    assert bands(compared) == 1
    assert "gated over rms" in texts(compared.svg())


def test_classes_share_one_scale_and_wide_intervals_are_cut() -> None:
    narrow, wide = rows(("rms",), "first"), rows(("rms",), "later")
    assert scale({"occurrence": narrow}, ["rms"]) == pytest.approx((-0.0075, 0.1575))
    assert not is_cut({"occurrence": narrow[:0], "vocabulary": narrow[:0]}, ["rms"])
    wide[0]["gain"]["rms"]["ci95"] = [-9.0, 9.0]
    assert scale({"occurrence": narrow, "vocabulary": wide}, ["rms"]) == pytest.approx((-0.06, 0.16))
    assert is_cut({"occurrence": narrow, "vocabulary": wide}, ["rms"])


def test_learning_curves_are_those_of_the_logs(tmp_path: Path) -> None:
    run = Run(tmp_path)
    lines = [{"step": 10 * k, "train": 5.0 - k, "valid": 4.0, "seconds": 1.5 * k, "more": 1} for k in range(3)]
    lines[1]["train"] = float("nan")
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "meta-train-seed2.jsonl").write_text(json.dumps(lines[0]))
    (tmp_path / "meta-train-notes.jsonl").write_text("of somebody else")
    curves = load_curves(run)
    assert list(curves) == ["training", "meta-training, seed 2"]
    drawing = learning(curves)
    assert drawing.numbers is not None
    assert drawing.numbers.rows[1] == ("training", "10", "–", "4.0000", "2")
    assert "step 20: train 3.0000" in drawing.svg()
    (tmp_path / "train.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"train\.jsonl, line 1 is no JSON"):
        load_curves(run)


def test_long_logs_are_told_in_part_and_end_with_the_last_validation() -> None:
    records: list[Validation] = [{"step": k, "train": 1.0, "valid": 1.0, "seconds": 1.0} for k in range(1000)]
    numbers = learning({"training": records}).numbers
    assert numbers is not None
    assert len(numbers.rows) <= ROWS
    assert numbers.rows[-1][1] == "999"
