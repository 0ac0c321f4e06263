"""``dynlm read``: what is shown and summed, memories, and one clear line for everything that is wrong."""

import dataclasses
import html
import io
import json
import re
import shutil
import sys

import pytest
import torch

from dynlm.cli.main import COMMANDS, main, stage
from dynlm.cli.read import ReadSettings, read
from dynlm.data.tokenizers import tokenize
from dynlm.files import read_tensors, write_tensors
from dynlm.optim.handmade import Static
from dynlm.session import reading
from dynlm.session.reader import Reader
from dynlm.session.session import SHIPPED, load_session, shipped_models
from dynlm.session.totals import Totals
from dynlm.types import Article
from support.commands import fails

A = "The cat sat on the mat .\nThe cat sat on the mat again , and the cat liked the mat .\n" * 12
B = "The dog saw the cat on the mat .\nThe dog liked the cat , and the cat sat on the mat .\n" * 12
TOLERANCE = 1e-4  # nats a token between reading on and reading on from a saved memory; dynlm.session.memory


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "a.txt").write_text(A)
    (tmp_path / "b.txt").write_text(B)
    return str(tmp_path / "a.txt"), str(tmp_path / "b.txt")


class Lines(io.BytesIO):
    """A pipe: gives one line at a time."""

    def read1(self, size=-1):
        return self.readline()


def quiet(*files, **settings):
    return read(ReadSettings(files, quiet=True, **settings))


def test_every_command_exists():
    assert all(callable(stage(name)) for name in COMMANDS)


@pytest.mark.parametrize("model", shipped_models())
def test_the_shipped_models_are_small_and_learn(texts, model):
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert "CC BY-SA 3.0" in (SHIPPED / model / "LICENSE.md").read_text()
    totals = quiet(texts[0], run=model)
    assert totals.gain > 0.5
    assert totals.tokens >= 300


@pytest.mark.parametrize("reset", ["article", "never"])
def test_totals_are_those_of_the_reader(texts, reset):
    totals = quiet(*texts, rule="rms", reset=reset)
    kit = load_session(reset=reset, light=True)
    articles = tokenize(kit.tokenizer, [Article("a", "a", A), Article("b", "b", B)])
    for reader, nats in zip(Reader(kit, "rms").pair(), (totals.static, totals.adapted), strict=True):
        with reader:
            expected = sum(float(reader.read(a, kit.tokenizer.start_id).double().sum()) for a in articles)
        assert nats == pytest.approx(expected, abs=1e-9 * expected)
    assert totals.tokens == sum(map(len, articles))
    assert totals.words == len((A + B).split())  # as wc -w counts
    assert totals.lines == (A + B).count("\n")
    assert totals.words + totals.lines == sum(a.n_words for a in articles)  # what perplexity is over
    assert totals.bytes == sum(a.n_bytes for a in articles)


ORDINARY = (
    """The dog ("Rex") isn't well-known; it's owned by U.S. citizens, of whom 2,000 paid $5.50.

He said: "Don't!" -- and the dogs' owners left.
"""
    * 8
)


def test_ordinary_text_is_spaced_for_the_shipped_model_and_shown_as_it_is(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(ORDINARY)
    path = str(tmp_path / "a.txt")
    auto, none, always = (
        quiet(path, run="wikitext2", rule="rms", spacing=choice) for choice in ("auto", "none", "wikitext")
    )
    assert (auto.words, auto.bytes) == (none.words, none.bytes) == (len(ORDINARY.split()), len(ORDINARY))
    assert auto.static == always.static < none.static - 500
    assert auto.adapted < none.adapted
    piped = read(ReadSettings(("-",), "wikitext2", quiet=True, rule="rms"), Lines(ORDINARY.encode()))
    assert piped == dataclasses.replace(auto, seconds=piped.seconds)
    capsys.readouterr()
    page = str(tmp_path / "p.html")
    assert main(["read", path, "--run", "wikitext2", "--rule", "rms", "--html", page]) == 0
    assert capsys.readouterr().out.startswith(ORDINARY)
    shown = re.findall(r'<span[^>]* data-s="[\d.]+" data-a="[\d.]+">([^<]*)</span>', (tmp_path / "p.html").read_text())
    assert html.unescape("".join(shown)) == ORDINARY


def test_spacing_is_the_model_s(finished, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(ORDINARY)
    path, run = str(tmp_path / "a.txt"), tmp_path / "run"
    shutil.copytree(finished[1], run)
    auto, none, always = (quiet(path, run=str(run), spacing=choice) for choice in ("auto", "none", "wikitext"))
    assert auto.static == none.static != always.static  # a run says nothing of it
    (run / "kit.json").write_text('{"spacing": "wikitext"}')
    assert quiet(path, run=str(run)).static == always.static
    (run / "kit.json").write_text('{"spacing": "wide"}')
    fails(capsys, ["read", path, "--run", run], "spacing is 'wide'", "'wikitext'")


def test_a_run_s_own_model_and_rules_are_read_with(finished, texts):
    run = str(finished[1])
    assert quiet(texts[0], run=run).gain != quiet(texts[0], run=run, rule="sgd").gain
    assert quiet(texts[0], run=run, rule="static").gain == 0


def test_standard_input_equals_the_file_and_words_count_across_chunks(texts):
    source = ("word " * 8000).strip()
    (a, b) = (
        read(ReadSettings(("-",), quiet=True, rule="static"), io.BytesIO(data))
        for data in (source.encode(), A.encode())
    )
    assert (a.words, a.lines) == (8000, 1)
    assert b.static == quiet(texts[0], rule="static").static


def test_plain_output_is_the_text_and_the_totals(texts, capsys):
    assert main(["read", texts[0], "--rule", "rms"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(A)
    assert "\x1b" not in out
    words = f"{len(A.split()):,} words in {A.count(chr(10)):,} lines ({len(A):,} bytes)"
    for part in (words, "tokens/s", "static", "rms", "bits per byte", "word perplexity", "gain +", "× likelier"):
        assert part in out.removeprefix(A)
    assert "threads: " in err


@pytest.mark.parametrize(("term", "pattern"), [("truecolor", r"48;2;\d+;\d+;\d+m"), ("", r"48;5;\d+m")])
def test_colours_cover_the_text_and_leave_it_whole(texts, capsys, monkeypatch, term, pattern):
    monkeypatch.setenv("COLORTERM", term)
    assert main(["read", texts[0], "--rule", "rms", "--color", "always"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(pattern, out)) > 50
    assert A in re.sub(r"\x1b\[[\d;]*m", "", out)
    assert not re.search(r"m[^\x1b]*\n[^\x1b]*\x1b\[0m", out)  # no background over an end of line


def test_a_hyphen_is_standard_input(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(B.encode())))
    assert main(["read", "-", "--rule", "static"]) == 0
    assert capsys.readouterr().out.startswith(B)


def test_the_page_holds_every_token_and_the_same_totals(texts, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["read", *texts, "--rule", "rms", "--html", str(page), "--quiet"]) == 0
    source, totals = page.read_text(), quiet(*texts, rule="rms")
    tokens = re.findall(r'<span[^>]* data-s="([\d.]+)" data-a="([\d.]+)">([^<]*)</span>', source)
    assert "".join(text for *_, text in tokens) == A + B
    assert sum(float(s) for s, *_ in tokens) == pytest.approx(totals.static, abs=1e-3 * totals.tokens)
    assert sum(float(a) for _, a, _ in tokens) == pytest.approx(totals.adapted, abs=1e-3 * totals.tokens)
    assert load_session().fingerprints(Static())["model"] in source
    assert f"page: {page}" in capsys.readouterr().err


@pytest.mark.parametrize("rule", ["rms", "gated"])
def test_reading_on_from_a_memory_is_reading_on(texts, tmp_path, rule):
    memory = str(tmp_path / "memory.safetensors")
    whole, first = quiet(*texts, rule=rule, reset="never"), quiet(texts[0], rule=rule, save_memory=memory)
    second = quiet(texts[1], rule=rule, load_memory=memory)
    assert first.static + second.static == pytest.approx(whole.static, abs=1e-3)
    assert abs(first.adapted + second.adapted - whole.adapted) < TOLERANCE * second.tokens
    assert second.adapted < quiet(texts[1], rule=rule).adapted - 10 * TOLERANCE * second.tokens  # it did remember
    weights = sum(p.numel() for p in load_session(light=True).model.parameters())
    assert (tmp_path / "memory.safetensors").stat().st_size < 6.2 * weights


def test_a_memory_of_another_model_or_rule_is_refused(finished, texts, tmp_path, capsys):
    memory, run = tmp_path / "memory.safetensors", str(finished[1])
    quiet(texts[0], run=run, save_memory=str(memory))
    load = ["read", texts[0], "--load-memory", memory]
    fails(capsys, load, "belongs to another model")
    fails(capsys, [*load, "--run", run, "--rule", "sgd"], "belongs to another rule")
    fails(capsys, ["read", texts[0], "--load-memory", tmp_path / "no"], "does not exist")
    tensors, meta = read_tensors(memory)
    write_tensors(memory, {name: t for name, t in tensors.items() if "delta" not in name}, meta)
    fails(capsys, [*load, "--run", run], "not a whole memory")
    write_tensors(memory, tensors, {})
    fails(capsys, [*load, "--run", run], "is no memory")
    memory.write_bytes(memory.read_bytes()[:99])
    fails(capsys, [*load, "--run", run], "truncated")


def test_bad_input_is_one_line(texts, tmp_path, capsys, finished):
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    (tmp_path / "empty.txt").write_text("")
    fails(capsys, ["read"], "no text to read")
    fails(capsys, ["read", tmp_path / "nope.txt"], "does not exist")
    fails(capsys, ["read", tmp_path / "binary"], "is binary")
    fails(capsys, ["read", tmp_path / "empty.txt"], "is empty")
    fails(capsys, ["read", texts[0], "--run", tmp_path / "nope"], "does not exist")
    fails(capsys, ["read", texts[0], "--run", tmp_path], "recipe.json does not exist")
    fails(capsys, ["read", texts[0], "--rule", "nope"], "has no rule 'nope'", "gated")
    fails(capsys, ["read", texts[0], "--html", tmp_path / "no" / "page.html"], "cannot write")
    fails(capsys, ["read", texts[0], "--save-memory", tmp_path], "cannot write")
    fails(capsys, ["read", texts[0], "--color", "maybe"], "invalid choice 'maybe' for argument", "--color")


def test_notes_and_titles_are_told(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    rows = [{"text": "one two", "title": "First"}, {"text": "three", "title": "Second"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), "--rule", "static"]
    assert main(["read", *arguments]) == 0
    out, err = capsys.readouterr()
    assert all(f"── {title}\n" in out for title in ("a.txt", "First", "Second"))
    assert "1 byte not UTF-8" in err


@pytest.mark.parametrize(("rule", "advice"), [("gated", "--rule rms"), ("rms", "--reset article")])
def test_where_learning_loses_it_is_told(texts, monkeypatch, capsys, rule, advice):
    quiet(*texts, rule=rule)
    assert "learning lost" not in capsys.readouterr().err
    monkeypatch.setattr(Totals, "gain", -0.1)
    quiet(*texts, rule=rule)
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "learning lost here" in line]
    assert advice in note


def test_transformers_are_not_imported_to_read():
    """They take seconds; a fresh process says what `dynlm read` imports, a cache and a mixture included."""
    import subprocess

    code = """import sys
from dynlm.cli.main import main
assert main(["read", "-", "--run", "wikipedia", "--rule", "gated+cache+mix", "--quiet"]) == 0
assert "transformers" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], input="A word.", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_stream_keeps_no_tokens(monkeypatch):
    """Without a page, JSON and a table of words nothing is recorded, so that a stream may be endless."""
    monkeypatch.setattr(reading, "Record", lambda: pytest.fail("tokens were kept"))
    monkeypatch.setattr(reading, "Occurrences", lambda keep: pytest.fail("words were kept"))
    assert read(ReadSettings(("-",), quiet=True, rule="static"), io.BytesIO(A.encode())).tokens


@pytest.mark.slow
def test_a_long_stream_stays_flat_and_finite():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    class Stream(io.RawIOBase):
        """Lines without end; notes the memory in use after a warm-up and at the end."""

        def __init__(self, lines):
            self.lines, self.left, self.seen = lines, lines, []

        def read1(self, size=-1):
            self.left -= 1
            if self.left in (self.lines * 3 // 4, 0):
                self.seen.append(resident())
            return A.split("\n")[self.left % 2].encode() + b"\n" if self.left > 0 else b""

    if sys.platform != "linux":
        pytest.skip("reads /proc")
    stream = Stream(1200)
    totals = read(ReadSettings(("-",), quiet=True, reset="never"), stream)
    assert totals.tokens > 10_000
    assert torch.isfinite(torch.tensor(totals.adapted))
    before, after = stream.seen
    assert after < 1.02 * before
