"""No sentence of the page that its figures deny: captions, shares and verdicts come from the numbers."""

from __future__ import annotations

import pytest

from dynlm.report.page import percent
from dynlm.report.svg import Drawing
from tests.report.pages import Page, verdicts

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
