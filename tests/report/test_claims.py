"""No sentence of the page that its figures deny: captions, shares and verdicts come from the numbers."""

from __future__ import annotations

import re

import pytest

from dynlm.report.evaluation import load_evaluation
from dynlm.report.html import _ahead
from dynlm.report.maps import words_again
from dynlm.report.page import course, percent, signed
from dynlm.report.svg import Drawing
from tests.report.pages import Page, verdicts
from tests.support.evaluations import pieces

pytestmark = pytest.mark.usefixtures("quick_figures")


@pytest.mark.parametrize(
    ("ci95", "said"),
    [([0.01, 0.2], "yes"), ([-0.01, 0.2], "not separated"), (None, "no interval")],
)
def test_comparison_says_whether_it_is_sure(make_run, ci95, said):
    run = make_run()
    compared = {"better": "gated", "worse": "rms", "gain_nats_per_token": 0.1, "ci95": ci95, "p": 0.01, "p_holm": 0.02}
    run.value["comparisons"] = [compared]
    run.save()
    page = Page(run)
    assert verdicts(page) == [said]
    methods = run.value["methods"]
    assert percent(1 - methods["gated"]["word_ppl"] / methods["rms"]["word_ppl"]) in page.source
    assert "<td>0.02</td>" in page.source


@pytest.mark.parametrize("articles", [3, 7, 8])
def test_comparison_of_few_articles_gives_no_verdict(make_run, articles):
    """Three articles cannot separate two methods, however narrow a bootstrap over them is."""
    run = make_run(articles=articles)
    compared = {"better": "gated", "worse": "rms", "gain_nats_per_token": 0.1, "ci95": [0.01, 0.2], "p_holm": 0.01}
    run.value["comparisons"] = [compared]
    run.save()
    assert verdicts(Page(run)) == ["yes" if articles >= 8 else "too few articles"]


def test_comparison_needs_interval_and_test_for_a_verdict(make_run):
    run = make_run()
    compared = {"better": "gated", "worse": "rms", "gain_nats_per_token": 0.1, "ci95": [0.01, 0.2], "p_holm": 0.5}
    run.value["comparisons"] = [compared, {**compared, "p_holm": None}]
    run.save()
    assert verdicts(Page(run)) == ["no test", "not separated"]


@pytest.mark.parametrize(
    ("first", "later", "said"),
    [
        (-0.2, 0.7, "used before gain 0.700 nats per token, and words used for the first time lose 0.200."),
        (0.2, 0.7, "used before gain 0.700 nats per token, and words used for the first time gain 0.200."),
        (0.01, -0.7, "used before lose 0.700 nats per token, and words used for the first time show no clear change"),
    ],
)
def test_caption_on_repeated_words_follows_the_figures(make_run, first, later, said):
    run = make_run()
    for row in run.value["breakdowns"]["occurrence"]:
        mean = {"first": first, "later": later}[row["bin"]]
        row["gain"] = {**row["gain"], "gated": {"mean": mean, "ci95": [mean - 0.1, mean + 0.1]}}
    run.save()
    assert said in Page(run).text


def test_shares_of_classes_are_of_all_tokens_read(make_run, monkeypatch):
    run, seen = make_run(), []

    def words(breakdowns, names, tokens):
        seen.append(tokens)
        return Drawing("words", "", 1, print)

    monkeypatch.setattr("dynlm.report.charts.words", words)
    for row, tokens in zip(run.value["breakdowns"]["occurrence"], (100, 44), strict=True):
        row["tokens"] = tokens
    run.save()
    share = round(100 * 144 / len(run.article))
    text = Page(run).text.replace("\N{NO-BREAK SPACE}", " ")
    assert f"({share} % belong to a word; the others are ends of lines)" in text
    assert seen == [len(run.article)]


def test_caption_of_the_stream_tells_the_panels_that_are_drawn(make_run):
    def told(*methods):
        text = Page(make_run(methods)).text
        return [
            part in text for part in ("its short-term memory", "a model whose weights learn", "of the learned rule")
        ]

    assert told("static", "rms", "gated") == [False, True, True]
    assert told("static", "stateless", "rms") == [True, True, False]
    assert told("static", "stateless", "rms", "gated") == [True, True, True]
    assert told("static", "gated+cache", "rms+cache") == [False, True, False]  # no rule alone: nothing to compare


@pytest.mark.parametrize("name", ["rms@fomaml", "sign"])
def test_kinds_of_methods_are_read_from_the_results(make_run, name):
    """A hand-made rule from a learned start, or one of a user's own, is no learned rule."""
    run = make_run(("static", name))
    run.value["methods"][name]["kind"] = "hand-made"
    run.save()
    text = Page(run).text
    assert f"best hand-made rule: {name}" in text
    assert text.count("none was evaluated") == 1


def test_perplexities_beyond_all_numbers_have_a_page(make_run):
    run = make_run()
    run.value["methods"]["static"].update(word_ppl=None, token_ppl=None)
    run.save()
    assert "beyond a million" in Page(run).text


@pytest.mark.parametrize(
    ("articles", "said"),
    [(1, ["the only one"]), (2, ["the most gained", "the least gained"])],
)
def test_articles_of_the_map_are_called_what_they_are(make_run, articles, said):
    page = Page(make_run(articles=articles))
    assert re.findall(r"<h3>Title \d <span class=\"kind\">([^:]*):", page.source) == said
    assert "Three articles" not in page.text


def test_three_articles_are_called_three(make_run):
    assert "Three articles: those where gated gains most" in Page(make_run()).text


@pytest.mark.parametrize(
    ("last", "said"), [(0.5, "falls by 4.5"), (7.0, "rises by 2.0"), (5.01, "stays about the same")]
)
def test_how_losses_go_from_the_first_to_the_third_occurrence(last, said):
    assert course([5.0, 4.0, last]) == said


def test_words_that_came_again_stand_in_front_and_say_how_losses_go(make_run):
    run = make_run()
    page = Page(run)
    words = words_again(load_evaluation(run), pieces)
    assert page.source.index('id="again"') < page.source.index('id="results"')
    mean = words["mean"]
    assert f"the loss of static {course(mean['static'])}, that of gated {course(mean['adapted'])}" in page.text
    run.losses_by_method["static"] = run.losses_by_method["static"] * 0 + 0.1  # static expected every word
    run.losses_by_method["gated"] = run.losses_by_method["static"]
    for name in ("static", "gated"):
        run.value["methods"][name]["nats"] = float(run.losses_by_method[name].sum())
    run.save()
    assert 'id="again"' not in Page(run).source


def test_the_median_article_is_told_beside_the_mean(make_run):
    run = make_run(articles=3)
    gain_T = run.losses_by_method["static"] - run.losses_by_method["gated"]
    middle = sorted(float(gain_T[run.article == a].mean()) for a in range(3))[1]
    row = re.search(r'<th scope="row">gated .*?</tr>', Page(run).source, re.DOTALL)[0]
    assert f"<td>{signed(middle)}</td>" in row


@pytest.mark.parametrize(("methods", "paired"), [(("static", "rms"), False), (("static", "rms", "gated"), True)])
def test_caption_of_the_position_tells_of_a_band_or_of_a_difference(make_run, methods, paired):
    text = Page(make_run(methods)).text
    assert ("by how much gated is better than rms" in text) is paired
    assert ("The band is the 95" in text) is not paired


def test_paired_difference_is_that_of_the_losses(make_run):
    run = make_run()
    title, stretches = _ahead(load_evaluation(run))
    first = run.position < 32
    difference = (run.losses_by_method["rms"] - run.losses_by_method["gated"])[first]
    assert title == "gated over rms"
    assert stretches[0]["gain"] == pytest.approx(float(difference.mean()), rel=1e-5)
    assert stretches[0]["tokens"] == int(first.sum())
    assert stretches[0]["ci95"][0] <= stretches[0]["gain"] <= stretches[0]["ci95"][1]


@pytest.mark.parametrize("wide", [True, False])
def test_arrows_are_explained_where_there_are_any(make_run, wide):
    run = make_run()
    if wide:
        run.value["breakdowns"]["vocabulary"][0]["gain"]["gated"]["ci95"] = [-50.0, 50.0]
    run.save()
    assert ("An arrow marks an interval that goes on" in Page(run).text) is wide


def test_a_rule_that_loses_is_said_to_lose(make_run):
    run = make_run(("static", "rms"))
    run.losses_by_method["rms"] = run.losses_by_method["static"] + 0.5
    nats = float(run.losses_by_method["rms"].sum())
    run.value["methods"]["rms"].update(nats=nats, gain_nats_per_token=-0.5, gain_ci95=[-0.6, -0.4])
    run.save()
    text = Page(run).text
    assert "less likely" in text
    assert "of 10: rms 0." in text
    assert "% higher" in text.replace("\N{NO-BREAK SPACE}", " ")


def test_every_figure_of_the_page_has_its_numbers(make_run):
    source = Page(make_run(reset="never")).source
    figures = re.findall(r"<figure id.*?</figure>", source, re.DOTALL)
    assert len(figures) > 6
    assert all("Numbers of this figure" in figure for figure in figures)


@pytest.mark.parametrize(
    ("more", "said"),
    [(0.05, "% higher"), (3.0, "times as high"), (900.0, "more than 10³⁰⁰ times as high")],
)
def test_perplexities_far_above_are_told_in_times(make_run, more, said):
    run = make_run(("static", "rms"))
    run.losses_by_method["rms"] = run.losses_by_method["static"] + more
    run.value["methods"]["rms"].update(nats=float(run.losses_by_method["rms"].double().sum()))
    run.save()
    text = Page(run).text.replace("\N{NO-BREAK SPACE}", " ")
    row = text[text.index("rms hand-made") :][:80]
    assert said in row
    assert ("more than 10³⁰⁰" in row) is (more == 900.0)
