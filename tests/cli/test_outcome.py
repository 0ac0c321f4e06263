"""What is left of reading: after an error all that was read is kept; the JSON object holds every figure."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch

from dynlm.cli.main import main
from dynlm.cli.read import Outcome, ReadSettings, read
from dynlm.cli.terminal import Screen
from dynlm.data.texts import read_texts
from dynlm.files import read_tensors
from dynlm.session.reader import Reader
from dynlm.session.step import Step
from support.commands import fails

LINE = "The widow Haverstock saw the cat on the mat , and Haverstock liked the cat .\n"
ROW = json.dumps({"title": "Good", "text": LINE * 6})
TOKENS = re.compile(r'<span[^>]* data-s="[\d.]+" data-a="[\d.]+">([^<]*)</span>')


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(LINE * 12)
    return path


def flags(tmp_path, *more):
    return ["--rule", "rms", "--html", tmp_path / "p.html", "--save-memory", tmp_path / "m", *more]


def same_memory(a, b):
    """Two files hold the same position, to the bit."""
    (tensors, meta), (others, other_meta) = read_tensors(a), read_tensors(b)
    assert meta == other_meta
    assert tensors.keys() == others.keys()
    return all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def kept(tmp_path, capsys, arguments, whole, *message):
    """The command fails with the message, and leaves what reading the files ``whole`` alone leaves."""
    fails(capsys, ["read", *arguments, *flags(tmp_path, "--quiet")], *message)
    assert "".join(TOKENS.findall((tmp_path / "p.html").read_text())) == "".join(
        t.article().text for t in read_texts(whole)
    )
    assert main(["read", *whole, "--rule", "rms", "--quiet", "--save-memory", str(tmp_path / "whole")]) == 0
    assert same_memory(tmp_path / "m", tmp_path / "whole")


@pytest.mark.parametrize("bad", ['{"text": 3}', "[1,", '{"title": "no text"}'])
def test_a_bad_line_after_good_ones_keeps_what_was_read(tmp_path, capsys, bad):
    (tmp_path / "b.jsonl").write_text(f"{ROW}\n" * 3 + bad + f"\n{ROW}\n")
    (tmp_path / "good.jsonl").write_text(f"{ROW}\n" * 3)
    kept(tmp_path, capsys, [tmp_path / "b.jsonl"], [str(tmp_path / "good.jsonl")], "b.jsonl, line 4")
    capsys.readouterr()
    assert main(["read", str(tmp_path / "b.jsonl"), "--rule", "rms"]) == 2
    out, err = capsys.readouterr()
    assert out.count("── Good") == 3
    assert re.search(r"\n[\d,]+ words in 18 lines", out)  # the totals come before the error line
    assert err.splitlines()[-1].startswith("dynlm: ")


def test_a_binary_second_file_keeps_the_first(text, tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    kept(tmp_path, capsys, [text, tmp_path / "binary"], [str(text)], "is binary")


def breaks(monkeypatch, reader, for_ever=False):
    """The model of a reader gives inf in the fourth segment, or from the fourth one on."""
    make = Reader.pair

    def broken(self):
        pair = make(self)
        broken = pair[reader == "adapted"]
        score, calls = broken.score, []

        def inf(*piece):
            calls.append(1)
            losses_S, hidden = score(*piece)
            return (losses_S + math.inf if len(calls) == 4 or (for_ever and len(calls) > 4) else losses_S), hidden

        broken.score = inf
        return pair

    monkeypatch.setattr(Reader, "pair", broken)


def test_a_loss_that_is_not_finite_keeps_the_segments_before_it(text, tmp_path, capsys, monkeypatch):
    """Both readers stand where the third segment ended."""
    with monkeypatch.context() as patch:
        breaks(patch, "static")
        fails(capsys, ["read", text, *flags(tmp_path, "--quiet")], "loss is inf")
    shown = TOKENS.findall((tmp_path / "p.html").read_text())
    assert len(shown) == 96
    stream = Reader.steps

    def three(self, *arguments):
        for number, scored in enumerate(stream(self, *arguments), 1):
            yield scored
            if number == 3:
                return

    monkeypatch.setattr(Reader, "steps", three)
    read(ReadSettings((str(text),), rule="rms", quiet=True, save_memory=str(tmp_path / "whole")))
    assert same_memory(tmp_path / "m", tmp_path / "whole")


@pytest.mark.parametrize("step", ["write_memory", "write_page", "print_json"])
def test_what_cannot_be_written_keeps_the_rest(text, tmp_path, capsys, monkeypatch, step):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Outcome, step, full)
    fails(capsys, ["read", text, *flags(tmp_path, "--json", "--quiet")], "No space left on device")
    assert (tmp_path / "m").exists() == (step != "write_memory")
    assert (tmp_path / "p.html").exists() == (step != "write_page")


def test_a_full_disk_keeps_the_page_and_the_earlier_memory(text, tmp_path):
    """A limit on the size of files stands for the disk: the page fits, the memory does not."""
    (tmp_path / "m").write_text("earlier")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731
    arguments = ["read", text, *flags(tmp_path, "--overwrite", "--quiet")]
    done = subprocess.run(
        [sys.executable, "-m", "dynlm.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    assert "tokens/s" in done.stdout
    assert (tmp_path / "p.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "m").read_text() == "earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "m", "p.html"]


def test_a_reader_of_the_output_that_leaves_loses_nothing(text, tmp_path, capsys, monkeypatch):
    def leave(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr(Screen, "tokens", leave)
    assert main(["read", *map(str, (text, *flags(tmp_path)))]) == 0
    assert len(TOKENS.findall((tmp_path / "p.html").read_text())) == 32
    assert (tmp_path / "m").exists()


def test_a_memory_of_what_ran_away_is_not_written(text, tmp_path, capsys, monkeypatch):
    update = Step.update

    def spoil(self):
        """The update after the last token that was read."""
        if self._scored is not None:
            update(self)
            self._reader.thetas[0].data.fill_(math.nan)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Step, "update", spoil)
    fails(capsys, ["read", text, *flags(tmp_path, "--quiet")], "was not written", "not finite")
    assert not (tmp_path / "m").exists()
    assert (tmp_path / "p.html").exists()


def test_reading_that_diverges_goes_on_from_the_trained_weights(text, tmp_path, capsys, monkeypatch):
    """The segment is scored as static scores it, and what comes after it is learned from, at a lower rate."""
    breaks(monkeypatch, "adapted")
    whole, err = as_json(capsys, text, "--run", "wikitext2", "--rule", "rms")
    assert "reading with rms diverged after 96 tokens; it goes on from the trained weights with lr 0.0005" in err
    tokens = whole["tokens"]
    assert tokens["adapted"][96:128] == tokens["static"][96:128]
    assert tokens["adapted"][64:96] != tokens["static"][64:96]
    assert tokens["adapted"][128:] != tokens["static"][128:]
    assert whole["totals"]["restarts"] == 1
    assert "Reading diverged once" in whole["note"]
    assert whole["provenance"]["rule: lr"] == pytest.approx(2e-3)


def test_a_text_that_the_trained_weights_cannot_score_blames_no_rule(text, tmp_path, capsys, monkeypatch):
    breaks(monkeypatch, "adapted", for_ever=True)
    message = fails(capsys, ["read", text, *flags(tmp_path, "--quiet")], "before any update: the model's weights")
    assert "lower its lr" not in message
    assert len(TOKENS.findall((tmp_path / "p.html").read_text())) == 96


def as_json(capsys, *arguments, code=0):
    capsys.readouterr()
    assert main(["read", *map(str, arguments), "--json"]) == code
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_the_json_object_holds_every_figure(text, tmp_path, capsys):
    (tmp_path / "b.jsonl").write_text(json.dumps({"title": "x\x1b[2J", "text": LINE}) + "\n")
    value, err = as_json(capsys, text, tmp_path / "b.jsonl", "--run", "wikitext2", "--rule", "rms")
    totals = read(ReadSettings((str(text), str(tmp_path / "b.jsonl")), "wikitext2", rule="rms", quiet=True))
    tokens = value["tokens"]
    assert "".join(tokens["text"]) == LINE * 13
    assert len(tokens["static"]) == len(tokens["adapted"]) == value["totals"]["tokens"] == totals.tokens
    for name, nats in (("static", totals.static), ("adapted", totals.adapted)):
        figures = value["totals"][name]
        assert sum(tokens[name]) == pytest.approx(nats, abs=1e-5 * totals.tokens)
        assert figures["nats"] == nats
        assert figures["nats_per_token"] == nats / totals.tokens
        assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(LINE * 13))
        assert figures["word_perplexity"] == pytest.approx(math.exp(nats / (len(LINE.split()) * 13 + 13)))
    first, second = value["articles"]
    assert (first["title"], first["first_token"]) == ("a.txt", 0)
    assert second == {"title": r"x\x1b[2J", "first_token": first["tokens"], "tokens": totals.tokens - first["tokens"]}
    assert (value["schema"], value["stopped_by"], value["rule"]) == (1, None, "rms")
    assert value["settings"]["files"] == [str(text), str(tmp_path / "b.jsonl")]
    assert "fingerprint of the model" in value["provenance"]
    haverstock = next(row for row in value["words"] if row["word"] == "Haverstock")
    assert haverstock["times"] == 24
    assert haverstock["adapted"][2] < haverstock["static"][2] == pytest.approx(haverstock["static"][2])
    for part in (LINE, "tokens/s", "── a.txt", "Haverstock  "):
        assert part in err  # all that is for a person


def test_the_json_object_is_whole_after_an_error(text, tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    value, err = as_json(capsys, text, tmp_path / "binary", "--quiet", code=2)
    assert "is binary" in value["stopped_by"]
    assert "".join(value["tokens"]["text"]) == LINE * 12
    assert err.splitlines()[-1].startswith("dynlm: ")
    assert LINE not in err  # quiet


def test_the_table_of_words_is_told_after_the_totals_unless_quiet(text, capsys):
    assert main(["read", str(text), "--rule", "rms"]) == 0
    table = capsys.readouterr().out.split("× likelier\n\n")[1].splitlines()
    assert "static → rms" in table[0]
    assert table[1].split() == ["times", "1st", "2nd", "3rd"]
    row = next(line for line in table[2:] if "Haverstock" in line)
    assert row.split()[1] == "24"
    assert len({line.rindex("→") for line in table[2:] if line.count("→") == 3}) == 1  # aligned
    assert main(["read", str(text), "--rule", "rms", "--quiet"]) == 0
    assert "→" not in capsys.readouterr().out


def test_names_and_titles_cannot_control_a_terminal(tmp_path, capsys):
    evil = "x\x1b]0;PWNED\x07\x1b[2J\nnext"
    (tmp_path / "b.jsonl").write_text(json.dumps({"title": evil, "text": LINE}) + "\n")
    path = tmp_path / f"{evil}.txt"
    path.write_bytes(b"caf\xe9 au lait and more\n")
    undecoded = tmp_path / os.fsdecode(b"\xff.txt")
    undecoded.write_text(LINE)
    arguments = ["read", tmp_path / "b.jsonl", path, undecoded, "--html", tmp_path / "p.html", "--rule", "static"]
    assert main([*map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert r"── x\x1b]0;PWNED\x07\x1b[2J\nnext" in out
    assert r"── \udcff.txt" in out
    assert "1 byte not UTF-8" in err
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", out + err)
    message = fails(capsys, ["read", tmp_path / f"no{evil}"], "does not exist", r"\x1b[2J\nnext")
    assert "\x1b" not in message


def test_a_memory_of_other_segments_is_read_with_a_note(finished, text, tmp_path, capsys):
    import shutil

    run, memory = tmp_path / "run", tmp_path / "m"
    shutil.copytree(finished[1], run)
    read(ReadSettings((str(text),), run=str(run), quiet=True, save_memory=str(memory)))
    load = ReadSettings((str(text),), run=str(run), quiet=True, load_memory=str(memory))
    read(load)
    assert "tokens; now" not in capsys.readouterr().err
    recipe = json.loads((run / "recipe.json").read_text())
    made = recipe["read"]["segment"]
    recipe["read"]["segment"] = made * 2
    (run / "recipe.json").write_text(json.dumps(recipe))
    read(load)
    assert f"updates every {made} tokens; now they come every {made * 2}" in capsys.readouterr().err


def test_output_that_cannot_be_written_keeps_memory_and_page(text, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    command = [sys.executable, "-m", "dynlm.cli.main", "read", *map(str, (text, *flags(tmp_path)))]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=-1, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert not re.search("Traceback|Exception ignored", done.stderr)
    assert done.stderr.splitlines()[-1].startswith("dynlm: No space left on device")
    assert {"m", "p.html"} <= {path.name for path in tmp_path.iterdir()}
