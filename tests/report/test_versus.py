"""Two runs side by side: only what both read is compared, and no sentence says more than the figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import dynlm
from dynlm.cli.main import main
from dynlm.report.pairing import side_by_side
from dynlm.report.versus import render_versus
from dynlm.types import InputError
from tests.support.evaluations import FakeRun

pytestmark = pytest.mark.usefixtures("quick_figures")


def make(folder: Path, name: str, methods: tuple[str, ...] = ("static", "rms", "gated"), articles: int = 10) -> FakeRun:
    return FakeRun(folder / name, methods, articles, "article")


def shift(run: FakeRun, method: str, by: float) -> None:
    """Raise the loss of every token, by a little more in every other article."""
    run.losses_by_method[method] = run.losses_by_method[method] + by * (0.9 + 0.2 * (run.article % 2))
    run.value["methods"][method]["nats"] = float(run.losses_by_method[method].double().sum())
    run.save()


def text_of(source: str) -> str:
    return " ".join(re.sub("<[^>]*>", " ", source).split())


@pytest.mark.parametrize(
    ("by", "articles", "said", "verdict"),
    [
        (-0.05, 10, "gated of b is better than gated of a by {size} nats per token", "second"),
        (0.05, 10, "gated of a is better than gated of b by {size} nats per token", "first"),
        (0.0, 10, "gated of b and gated of a have the same losses.", "equal"),
        (
            -0.25,
            5,
            "is {size} nats per token below that of gated of a, but there are too few articles",
            "too few articles",
        ),
    ],
)
def test_the_first_sentence_follows_the_figures(tmp_path, by, articles, said, verdict):
    a, b = (make(tmp_path, name, articles=articles) for name in "ab")
    shift(b, "gated", by)
    both = side_by_side(a, b)
    assert both.differences[0].verdict == verdict
    assert said.format(size=f"{abs(both.differences[0].gain):.3f}") in text_of(render_versus(both))


@pytest.mark.parametrize(("by", "direction"), [(-0.001, "below"), (0.001, "above")])
def test_what_is_not_separated_is_not_called_better(tmp_path, by, direction):
    a, b = make(tmp_path, "a"), make(tmp_path, "b")
    noise = torch.randn(10, generator=torch.Generator().manual_seed(1))
    noise = noise[b.article.long()]
    b.losses_by_method["gated"] = b.losses_by_method["gated"] + noise - noise.mean()
    shift(b, "gated", by)
    both = side_by_side(a, b)
    text = text_of(render_versus(both))
    assert both.differences[0].verdict == "not separated"
    assert f"nats per token {direction} that of gated of a, but that is not separated from zero." in text
    assert "is better than gated" not in text


def test_a_paired_difference_is_that_of_the_losses(tmp_path):
    a, b = make(tmp_path, "a"), make(tmp_path, "b")
    shift(b, "rms", 0.125)
    rms = next(row for row in side_by_side(a, b).differences if row.second == "rms")
    difference_T = a.losses_by_method["rms"] - b.losses_by_method["rms"]
    assert rms.gain == pytest.approx(float(difference_T.mean()), rel=1e-4)
    assert -0.1375 < rms.ci95[0] < rms.gain < rms.ci95[1] < -0.1125
    assert rms.gains == pytest.approx([-0.1125, -0.1375] * 5, rel=1e-4)


def test_only_shared_articles_count_and_the_page_says_so(tmp_path):
    a, b = make(tmp_path, "a"), make(tmp_path, "b")
    keep = b.article >= 4  # b read the last six only
    b.losses_by_method = {name: loss[keep] for name, loss in b.losses_by_method.items()}
    b.article, b.position, b.ids = b.article[keep] - 4, b.position[keep], b.ids[keep]
    b.gates, b.value["breakdowns"] = {}, {}
    titles = b.value["data"]["titles"]
    b.value["data"]["titles"] = titles[4:]
    b.value.update(articles=6, tokens=int(keep.sum()))
    shift(b, "static", 0.0)
    shift(b, "rms", 0.0)
    shift(b, "gated", 0.0)
    both = side_by_side(a, b)
    assert [article.title for article in both.shared] == titles[4:]
    assert all(row.verdict == "equal" for row in both.differences)
    text = text_of(render_versus(both))
    assert "6 articles in common, of 10 that a read and 6 that b read" in text
    assert "Both read the same" not in text
    assert "Both read the same 10 articles." in text_of(render_versus(side_by_side(a, a)))


def test_equal_tokenizers_pair_articles_by_their_tokens(tmp_path):
    a, b = make(tmp_path, "a"), make(tmp_path, "b")
    for run in (a, b):
        run.value["tokenizer"] = {"class": "T", "vocab_size": 9, "fingerprint": "same"}
    b.value["data"].update(fingerprint="other", titles=[f"Renamed {k}" for k in range(10)])
    b.ids[b.article == 3] = 0
    a.save()
    b.save()
    both = side_by_side(a, b)
    assert [article.title for article in both.shared] == [f"Title {k}" for k in range(10) if k != 3]
    assert "Both have the same tokenizer" in text_of(render_versus(both))


def test_other_tokenizers_need_the_same_data_and_are_told_of(tmp_path):
    a, b = make(tmp_path, "a"), make(tmp_path, "b")
    assert "Their tokenizers differ, or are not known" in text_of(render_versus(side_by_side(a, b)))
    b.value["data"]["fingerprint"] = "other"
    b.save()
    with pytest.raises(InputError, match="read other data with other tokenizers"):
        side_by_side(a, b)


def test_runs_without_a_common_article_are_refused(tmp_path):
    a, b = make(tmp_path, "a"), make(tmp_path, "b")
    b.value["data"]["titles"] = [f"Other {k}" for k in range(10)]
    b.save()
    with pytest.raises(InputError, match="no article in common"):
        side_by_side(a, b)


def test_articles_of_one_title_are_paired_in_their_order(tmp_path):
    a = make(tmp_path, "a")
    a.value["data"]["titles"] = ["Same"] * 10
    a.save()
    both = side_by_side(a, a)
    assert len(both.shared) == 10
    assert all(article.first == article.second for article in both.shared)


def test_methods_of_both_runs_are_told_and_what_differs(tmp_path):
    a, b = make(tmp_path, "a", ("static", "rms")), make(tmp_path, "b", ("static", "gated"))
    b.value["segment"] = 16
    b.save()
    both = side_by_side(a, b)
    assert [(row.first, row.second) for row in both.differences] == [("rms", "gated"), ("static", "static")]
    assert [(name, x is None, y is None) for name, x, y in both.losses()] == [
        ("rms", False, True),
        ("static", False, False),
        ("gated", True, False),
    ]
    assert both.settings() == [("segment", 32, 16)]
    text = text_of(render_versus(both))
    assert "gated over rms" in text
    assert "Nothing that they recorded" not in text
    assert "Nothing that they recorded" in text_of(render_versus(side_by_side(a, a)))


def test_hostile_names_are_escaped(tmp_path):
    evil = "<script>alert(1)<"
    a = make(tmp_path, evil, ("static", evil))
    assert evil not in render_versus(side_by_side(a, a)).replace("<script>\nconst", "")


@pytest.mark.drawn
def test_the_command_writes_one_page_and_python_the_same(tmp_path, monkeypatch, capsys):
    make(tmp_path, "a")
    shift(make(tmp_path, "b"), "gated", -0.25)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a", "b"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"gated  \+0\.25\d\d \[\+0\.2\d+, \+0\.2\d+\]  b is better", said)
    page = Path("a-and-b.html").read_text()
    assert page.count("<svg") == 2 * 2
    assert page.count("Numbers of this figure") > 1
    compared = dynlm.Results.compare("a", "b", "again.html")
    assert compared.table() in said
    assert Path("again.html").read_text() == page
    assert main(["report", "a", "b", "--html", "other.html"]) == 0
    assert Path("other.html").read_text() == page


def test_the_command_replaces_no_foreign_file_and_names_what_is_missing(tmp_path, monkeypatch, capsys):
    make(tmp_path, "a")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a", "nothing"]) == 2
    assert "run `dynlm evaluate`" in capsys.readouterr().err
    make(tmp_path, "b")
    Path("notes.html").write_text("mine")
    assert main(["report", "a", "b", "--html", "notes.html"]) == 2
    assert "was not written by dynlm" in capsys.readouterr().err
    assert Path("notes.html").read_text() == "mine"
    assert main(["report", "a", "b"]) == 0
    assert main(["report", "a", "b"]) == 0  # its own page may be replaced
