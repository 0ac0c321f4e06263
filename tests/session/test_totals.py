"""How totals are told: counts that people know, three digits, and a warning where figures mislead."""

import json
import math
from pathlib import Path

import pytest

from dynlm.cli.main import main
from dynlm.cli.read import ReadSettings, read
from dynlm.data.stdlib import load_topics
from dynlm.runs import Run
from dynlm.session.session import best_validation, load_session, shipped_models
from dynlm.session.totals import FAR_TOKENS, Totals, word_lines

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "wikitext2-cpu"


def totals(static=5.0, adapted=4.0, tokens=1000, words=600, n_bytes=4000, **more):
    sums = Totals(1, tokens, words=words, lines=40, bytes=n_bytes, static=static * tokens, adapted=adapted * tokens)
    for name, value in more.items():
        setattr(sums, name, value)
    return sums


def test_totals_are_told_with_three_digits():
    first, static, adapted, gain = totals(static=5.0, adapted=3.0466, tokens=1402, seconds=0.5).told("gated")
    assert first == "600 words in 40 lines (4,000 bytes), 1,402 tokens, 0.5 s (2,800 tokens/s)"
    assert " ".join(static.split()) == "static 2.53 bits per byte 5.00 nats per token word perplexity 57,100"
    assert " ".join(adapted.split()) == "gated 1.54 bits per byte 3.05 nats per token word perplexity 792"
    assert gain.strip() == "gain +1.95 nats per token: each token 7.05 × likelier"
    assert (
        totals(static=5.0, adapted=5.1).told("rms")[-1].endswith("−0.100 nats per token: each token 1.11 × less likely")
    )


@pytest.mark.parametrize(("words", "told"), [(460, False), (470, True)])
def test_a_word_perplexity_that_says_nothing_is_left_out(words, told):
    """exp(5,800 nats / 500 words and lines) is 109,098; over 510 it is 87,000."""
    sums = totals(static=5.8, words=words)
    assert any("perplexity" in line for line in sums.told("rms")) == told
    assert sums.figures()["static"]["word_perplexity"] == math.exp(5800 / (words + 40))  # programs get it


def test_figures_have_no_infinity():
    figures = totals(static=900.0, words=0, lines=1).figures()
    assert figures["static"]["word_perplexity"] is None
    json.dumps(figures, allow_nan=False)
    assert totals(tokens=0, words=0, n_bytes=0, lines=0).figures()["gain_nats_per_token"] == 0


@pytest.mark.parametrize(
    ("static", "tokens", "home", "warned"),
    [
        (6.31, 1000, 4.0, True),
        (6.30, 1000, 4.0, False),  # exp(2.3) is just below ten
        (9.0, FAR_TOKENS - 1, 4.0, False),
        (9.0, FAR_TOKENS, 4.0, True),
        (9.0, 1000, None, False),
    ],
)
def test_text_far_from_what_the_model_knows_is_told(static, tokens, home, warned):
    note = totals(static=static, tokens=tokens).note(home)
    assert ("far from what the model knows" in note) == warned
    assert (f"{static:.2f} nats per token here, but 4.00 on" in note) == warned


@pytest.mark.parametrize(("unknown", "warned"), [(39, False), (40, True), (1452, True)])
def test_the_share_that_the_tokenizer_does_not_know_is_told(unknown, warned):
    note = totals(unknown_bytes=unknown).note(4.0)
    assert note.startswith("The tokenizer does not know") == warned
    assert (f"{unknown / 40:#.3g} % of the text" in note) == warned


def test_the_shipped_model_knows_its_home():
    """The figure is that of the results: static reading of the validation articles."""
    results = json.loads((RESULTS / "results.json").read_text())["methods"]["static"]
    home = load_session("wikitext2", light=True).home
    assert home == pytest.approx(math.log(results["token_ppl"]), abs=0.005)
    assert home == min(json.loads(line)["valid"] for line in (RESULTS / "train.jsonl").read_text().splitlines())


@pytest.mark.parametrize("log", ["", "{}\n", '{"valid": 3.5}\n{"val', "[]\n", '{"valid": NaN}\n', '{"valid": null}\n'])
def test_a_run_without_a_whole_log_has_no_home(tmp_path, log):
    (tmp_path / "train.jsonl").write_text(log)
    assert best_validation(Run(tmp_path)) is None
    assert best_validation(Run(tmp_path / "nothing")) is None


def test_a_run_s_home_is_its_best_validation(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"valid": 3.5}\n{"valid": 3.25}\n{"valid": 3.75}\n')
    assert best_validation(Run(tmp_path)) == 3.25


ENGLISH = """The house on the hill was built in the early years of the century by a family that had come from the
north of the country . They lived there for many years , and the house was known as one of the largest in the area .
In the war it was used as a hospital , and after the war it was sold to the city , which made it a museum .
"""
GERMAN = """Das Haus auf dem Berg wurde in den ersten Jahren des Jahrhunderts von einer Familie gebaut, die aus dem
Norden gekommen war. Sie lebten dort viele Jahre, und das Haus galt als eines der größten der Gegend. Im Krieg diente
es als Lazarett, und nach dem Krieg wurde es an die Stadt verkauft, die daraus ein Museum machte.
"""


@pytest.mark.parametrize("model", shipped_models())
@pytest.mark.parametrize(("text", "warned"), [(ENGLISH, False), (GERMAN, True)])
def test_german_is_far_from_the_shipped_models_and_english_is_not(tmp_path, capsys, text, warned, model):
    (tmp_path / "a.txt").write_text(text)
    page = tmp_path / "p.html"
    options = ["--rule", "rms", "--quiet", "--html", str(page)]
    assert main(["read", str(tmp_path / "a.txt"), "--run", model, *options]) == 0
    assert ("note: This text is far" in capsys.readouterr().err) == warned
    assert ("This text is far" in page.read_text()) == warned


def test_long_words_are_cut_and_an_empty_table_says_nothing():
    row = {"word": "x" * 40, "times": 1234, "static": [30.0, 9.96], "adapted": [30.0, 1.0]}
    lines = word_lines([row], {"words": 1, "static": [1.0] * 3, "adapted": [1.0] * 3}, "rms")
    assert lines[2] == f"{'x' * 19}…  1,234   30.0 →  30.0   10.0 →   1.0"
    assert len(lines) == 3  # the mean of one word is that word
    mean = {"words": 12, "static": [30.0, 20.0, 10.0], "adapted": [30.0, 10.0, 1.0]}
    assert word_lines([row], mean, "rms")[3].split()[:4] == ["mean", "of", "12", "words"]
    assert word_lines([], None, "rms") == []


def test_characters_that_the_shipped_tokenizer_lacks_are_counted(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("人工智能是计算机科学的一个分支。\n" * 20)
    assert (
        read(ReadSettings((str(tmp_path / "a.txt"),), "wikitext2", rule="static", quiet=True)).unknown_bytes
        == len("人工智能是计算机科学的一个分支。".encode()) * 20
    )
    assert "The tokenizer does not know" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text(ENGLISH)
    assert read(ReadSettings((str(tmp_path / "a.txt"),), "wikitext2", rule="static", quiet=True)).unknown_bytes == 0
    assert "tokenizer" not in capsys.readouterr().err


def test_updates_that_the_trust_region_holds_back_are_told_where_they_are_many(tmp_path):
    assert totals(updates=1000, clipped=20).note(None) == ""
    note = totals(updates=1000, clipped=21, restarts=2).note(None)
    assert "21 of 1,000 updates were scaled down to the trust region" in note
    assert note.startswith("Reading diverged 2 times and went on")
    (tmp_path / "code.txt").write_text("".join(f"xs[{i}] = {{'k{i}': f({i}, {i} ** 2)}}\n" for i in range(80)))
    far = read(ReadSettings((str(tmp_path / "code.txt"),), run="wikitext2", rule="gated", spacing="none", quiet=True))
    assert 0 < far.clipped <= far.updates == math.ceil(far.tokens / 32)


def test_no_text_of_the_documentation_ends_far_worse_than_static(tmp_path):
    """Without a trust region the page on asyncio costs gated 43 nats a token, raw as it stands."""
    topics = [topic for topic in load_topics() if topic.title == "async"]
    (tmp_path / "async.txt").write_text(topics[0].text[:6000])
    far = read(ReadSettings((str(tmp_path / "async.txt"),), run="wikitext2", rule="gated", spacing="none", quiet=True))
    assert far.gain > 1
