"""The page: complete, self-contained, the same each time, and never half written."""

from __future__ import annotations

import json
import re

import pytest
import torch

from dynlm.report.evaluation import load_evaluation
from dynlm.report.html import write_report
from dynlm.report.page import percent, plain, ppl, signed, span
from dynlm.types import InputError
from tests.report.pages import Page, verdicts
from tests.support.evaluations import pieces

pytestmark = pytest.mark.usefixtures("quick_figures")


@pytest.mark.drawn
@pytest.mark.parametrize("reset", ["never"])
def test_page_is_well_formed_and_loads_nothing(make_run, reset):
    page = Page(make_run(reset=reset))
    assert page.source.startswith("<!DOCTYPE html>")
    assert page.open == []
    assert (
        page.tags.count("script") == 2
    )  # its own, which the policy names by its hash, and the losses, which do not run
    assert 'type="application/json"' in page.source
    assert not {"img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    loads = {value for key, value in page.attributes if key in ("src", "href", "xlink:href", "srcset", "data")}
    assert all(value.startswith("#") or value == "data:," for value in loads)
    assert not re.search(r"https?://|@import|url\((?!#)", page.source)
    assert "default-src 'none'" in page.source
    assert not any(key.startswith("on") for key, _ in page.attributes)


def test_page_tells_every_method_and_its_numbers(make_run):
    run = make_run()
    page = Page(run)
    assert page.tags.count("svg") == 2 * 7  # each wide and narrow
    for name, method in run.value["methods"].items():
        assert f'<th scope="row">{name} ' in page.source
        assert ppl(method["word_ppl"]) in page.text
        assert f"{method['bits_per_byte']:.3f}" in page.text
    assert "best hand-made rule: rms" in page.text
    assert "best learned rule: gated" in page.text
    assert "than static, " in page.text
    assert "4,321" in page.text
    assert "lr 0.002 " in page.text.replace("lr0.002", "lr 0.002 ")
    for part in ("sha256:4f1c9a77", "arXiv:1803.10631", "LSTM", "1,574,912", "2.13.0", "Title 7"):
        assert part in page.text


@pytest.mark.drawn
def test_ids_are_unique_in_the_page(make_run):
    ids = [value for key, value in Page(make_run()).attributes if key == "id"]
    assert len(ids) > 100
    assert len(ids) == len(set(ids))


def test_reset_policy_is_told(make_run):
    assert "one long stream" in Page(make_run(reset="never")).text
    assert "forgotten when the article ends" in Page(make_run(reset="article")).text


@pytest.mark.drawn
def test_same_evaluation_gives_the_same_bytes(make_run):
    run = make_run()
    first = write_report(run).read_bytes()
    assert write_report(run) == run.report == run.path / "report.html"
    assert run.report.read_bytes() == first


@pytest.mark.drawn
def test_hostile_text_is_escaped(make_run):
    evil = '</title></style><script>alert("1")</script><img src=x onerror=y>'
    run = make_run(["static", evil, "{{ 7 * 7 }}"])
    data = run.value["data"]
    data.update(source=evil, split=evil, fingerprint=evil, titles=[evil] * len(data["titles"]))
    run.value["model"][evil] = {evil: [evil]}
    run.value["methods"][evil]["settings"] = {evil: evil}
    run.value["comparisons"] = [{"better": evil, "worse": "static", "gain_nats_per_token": 0.1, "ci95": [0.0, 0.2]}]
    run.save()
    page = Page(run)
    assert "img" not in page.tags
    assert page.tags.count("script") == 2
    assert evil in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert page.open == []


def test_static_alone(make_run):
    page = Page(make_run(["static"]))
    assert "svg" not in page.tags
    assert page.text.count("none was evaluated") == 2
    assert "Only static was evaluated" in page.text


def test_one_article_claims_no_interval(make_run):
    run = make_run(articles=1)
    for method in run.value["methods"].values():
        method["gain_ci95"] = [method["gain_nats_per_token"]] * 2
    compared = {"better": "gated", "worse": "rms", "gain_nats_per_token": 0.1, "ci95": [0.1, 0.1]}
    run.value["comparisons"] = [compared]
    run.save()
    page = Page(run)
    assert "1 article," in page.text
    assert verdicts(page) == ["too few articles"]


@pytest.mark.drawn
def test_the_stream_knows_three_levels_of_memory(make_run):
    text = Page(make_run(("static", "stateless", "rms", "gated"))).text
    for level in ("short-term memory", "medium-term memory", "a learned memory: gated instead of rms"):
        assert level in text


def test_a_run_without_reset_tells_of_switches_and_of_its_beginning(make_run):
    page = Page(make_run(reset="never"))
    assert "After a switch of articles" in page.text
    assert "What the stream leaves of its beginning" in page.text
    assert "After a switch" not in Page(make_run()).text


def test_an_evaluation_of_an_earlier_version_has_a_page_too(make_run):
    run = make_run()
    del run.value["breakdowns"]
    run.gates = {}
    run.save()
    assert Page(run).tags.count("svg") == 2 * 4


def test_token_maps_show_three_articles_with_the_losses_of_every_method(make_run):
    run = make_run()
    page = Page(run)
    assert page.source.count('class="tokens short"') == 3
    losses = json.loads(re.search(r'id="losses">(.*?)</script>', page.source, re.DOTALL)[1])
    assert list(losses) == list(run.value["methods"])
    starts = {int(run.article.tolist().index(a)): a for a in run.article.unique().tolist()}
    shown = {name: [len(article) for article in articles] for name, articles in losses.items()}
    assert len({tuple(lengths) for lengths in shown.values()}) == 1
    assert sum(shown["static"]) == page.source.count("data-s=")
    known = {round(1000 * float(run.losses_by_method["static"][start])) for start in starts}
    assert all(abs(article[0] - min(known, key=lambda n: abs(n - article[0]))) <= 1 for article in losses["static"])


def test_articles_can_be_chosen_by_title(make_run):
    run = make_run()
    source = write_report(run, pieces=pieces, titles=["Title 7", "Title 2"]).read_text(encoding="utf-8")
    assert re.findall(r"<h3>(Title \d) ", source) == ["Title 7", "Title 2"]
    assert source.count("data-s=") == int(((run.article == 7) | (run.article == 2)).sum())
    with pytest.raises(InputError, match="article 'Titel 7' was not read: did you mean 'Title 7'"):
        write_report(run, pieces=pieces, titles=["Titel 7"])


def test_without_a_tokenizer_there_is_no_map(make_run):
    source = write_report(make_run()).read_text(encoding="utf-8")
    assert 'id="map"' not in source


def test_at_most_five_methods_are_drawn_and_all_are_told(make_run):
    names = ("static", "sgd", "adam", "rms", "cache", "rms+cache", "gated", "gated+cache", "lstm")
    run = make_run(names)
    evaluation = load_evaluation(run)
    assert len(evaluation.shown) == 5
    assert {evaluation.best("learned"), evaluation.best("hand-made", alone=True), "cache"} <= set(evaluation.shown)
    text = Page(run).text
    assert all(name in text for name in names)


@pytest.mark.parametrize("kinds", ["png", "svg,pdf"])
def test_figures_as_files(make_run, kinds):
    run = make_run()
    write_report(run, kinds)
    names = {"gain", "stream", "by-position", "per-article", "words", "calibration", "gates-0"}
    assert {path.name for path in run.figures.iterdir()} == {f"{n}.{kind}" for n in names for kind in kinds.split(",")}
    magic = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    assert all(path.read_bytes().startswith(magic[path.suffix[1:]]) for path in run.figures.iterdir())


def test_an_unknown_format_is_one_clear_line_and_writes_nothing(make_run):
    run = make_run()
    with pytest.raises(InputError, match="format 'gif' is unknown: choose from svg, png, pdf"):
        write_report(run, "png,gif")
    assert not run.figures.exists()
    assert not run.report.exists()


def test_gates_that_do_not_fit_are_refused(make_run):
    run = make_run()
    run.gates["gated"] = run.gates["gated"][:, 1:]
    run.save()
    with pytest.raises(InputError, match="gates of 'gated' of shape"):
        write_report(run)


def change(key, value):
    return lambda run: run.value.__setitem__(key, value)


def drop_loss(run):
    del run.losses_by_method["rms"]


def cut_loss(run):
    run.losses_by_method["rms"] = run.losses_by_method["rms"][:-1]


def other_loss(run):
    run.losses_by_method["rms"] = run.losses_by_method["rms"] * 1.1


def broken_loss(run):
    run.losses_by_method["rms"] = torch.full_like(run.losses_by_method["rms"], float("nan"))


def cut_article(run):
    run.article = run.article[:-1]


def drop_title(run):
    run.value["data"]["titles"].pop()


def drop_number(run):
    del run.value["methods"]["rms"]["word_ppl"]


def drop_static(run):
    del run.value["methods"]["static"]


BROKEN = [
    (change("schema", 1), "schema 1, this version reads 2"),
    (change("schema", None), "schema None"),
    (change("data", []), "data is []: expected a table"),
    (change("tokens", 0), "tokens is 0: expected a whole number"),
    (
        change("comparisons", [{"better": "x", "worse": "y", "gain_nats_per_token": 0, "ci95": None}]),
        "methods lack 'x'",
    ),
    (drop_loss, "no 'losses/rms'"),
    (cut_loss, "tokens in 'losses/rms', results.json has"),
    (other_loss, "nats for 'rms'"),
    (broken_loss, "'losses/rms' holds numbers that are not finite"),
    (cut_article, "tokens in 'article'"),
    (drop_title, "names article 9"),
    (drop_number, "methods.rms lacks 'word_ppl'"),
    (drop_static, "methods lack 'static'"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_inconsistent_evaluation_is_one_clear_line_and_keeps_the_earlier_report(make_run, damage, message):
    run = make_run()
    run.report.write_text("earlier")
    damage(run)
    run.save()
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert run.report.read_text() == "earlier"
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["results", "losses"])
def test_missing_file_names_the_command_that_makes_it(make_run, name):
    run = make_run()
    getattr(run, name).unlink()
    with pytest.raises(InputError, match="run `dynlm evaluate`"):
        write_report(run)
    assert not run.report.exists()


def test_numbers_are_told_with_sensible_digits():
    assert [ppl(value) for value in (9.876, 99.44, 123.456, 12345.6)] == ["9.88", "99.44", "123.5", "12,346"]
    assert [signed(value) for value in (0.1234, -0.1, -0.0001, None)] == ["+0.123", "−0.100", "0.000", "–"]
    assert span([-0.1, 0.25]) == "−0.100 to +0.250"
    assert span(None) == "–"
    assert percent(0.345) == "34.5\N{NO-BREAK SPACE}% lower"
    assert percent(-0.02) == "2.0\N{NO-BREAK SPACE}% higher"
    assert percent(-11.5) == "12.5 times as high"
    assert [plain(value) for value in ("a", 1234, 0.0020000001, 3000.0)] == ["a", "1,234", "0.002", "3,000"]
    assert [plain(value) for value in (True, None, [1, "é"])] == ["true", "null", '[1, "é"]']
