"""The scripts that the README names run, and write what they say."""

import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from html import unescape
from pathlib import Path
from unittest import mock

import pytest

import dynlm
from dynlm.session.session import load_session

SCRIPTS = Path(__file__).parents[1] / "scripts"


def start(name, *arguments):
    """What a script prints that runs in a process of its own."""
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.fixture
def run(monkeypatch, capsys):
    """What a script prints that runs here, where the libraries are imported; the environment stays as it was."""

    def run(name, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / name), *map(str, arguments)])
        with mock.patch.dict(os.environ), warnings.catch_warnings():
            warnings.simplefilter("default")  # as in a process of its own
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                if end.code:
                    raise
        return capsys.readouterr().out

    return run


def test_bench_reading_times_every_rule_against_static(run, tmp_path):
    printed = run("bench_reading", "--quick", "--threads", "1", "--json", tmp_path / "bench.json")
    result = json.loads((tmp_path / "bench.json").read_text())
    assert set(result["rules"]) == {"static", "sgd", "rms", "adam", "gated"}
    assert result["rules"]["static"]["times_static"] == 1
    assert result["rules"]["gated"]["times_static"] > result["rules"]["sgd"]["times_static"] > 1
    assert "× static" in printed


def test_bench_step_times_learned_rules_against_adamw(run, tmp_path):
    files = ["--json", tmp_path / "bench.json", "--plot", tmp_path / "bench.svg"]
    methods = ["copy", "adamw-fused", "gated", "gated-eager", "gated-bf16", "general"]
    printed = run("bench_step", "--quick", "--threads", "1", "--methods", *methods, *files)
    rows = {row["method"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert list(rows) == methods
    assert rows["adamw-fused"]["times_adamw"] == 1
    assert all(rows[name]["ms"] > 0 for name in methods)
    assert rows["adamw-fused"]["state_bytes"] == pytest.approx(8, rel=0.01)
    assert rows["general"]["state_bytes"] == pytest.approx(12, rel=0.01)
    assert rows["gated-bf16"]["state_bytes"] == pytest.approx(12, rel=0.01)
    assert "bytes of state" in printed
    assert "<svg " in (tmp_path / "bench.svg").read_text()


@pytest.mark.slow
def test_bench_general_compares_with_adamw_and_goes_on_where_it_was(run, tmp_path):
    some = ["--tasks", "mixer-letters", "--optimizers", "adamw", "general", "--seeds", "1", "--horizon", "10"]
    files = ["--json", tmp_path / "bench.json", "--resume", tmp_path / "runs.jsonl"]
    run("bench_general", *some, *files)
    finished = (tmp_path / "runs.jsonl").read_text()
    records = [json.loads(line) for line in finished.splitlines()]
    assert [r["optimizer"] for r in records] == ["adamw"] * 7 + ["general"]
    assert not any(r["diverged"] for r in records if r["lr"] <= 1e-2)
    assert "× best AdamW" in run("bench_general", *some, *files)
    assert (tmp_path / "runs.jsonl").read_text() == finished


@pytest.mark.slow
def test_bench_meta_measures_each_case_and_stops_at_the_memory_limit(tmp_path):
    files = ["--json", tmp_path / "bench.json", "--plot", tmp_path / "bench.svg"]
    some = ["--methods", "reading,functional", "--lengths", "8,32", "--limit-gib", "0.5"]
    printed = start("bench_meta", "--quick", "--threads", "1", *some, *files)
    result = json.loads((tmp_path / "bench.json").read_text())
    status = {(case["method"], case["T"]): case["status"] for case in result["cases"]}
    ok = dict.fromkeys([("reading", 8), ("reading", 32), ("functional", 8)], "ok")
    assert status == ok | {("functional", 32): "memory"}
    short = result["cases"][2]
    assert short["times_reading"] > 1
    assert short["peak_mib"] - short["baseline_mib"] > 20  # the graph
    assert 8 < result["largest"]["functional"]["T_estimate"] < 32
    assert "stopped by the memory limit" in printed
    assert (tmp_path / "bench.svg").read_text().rstrip().endswith("</svg>")


def test_bench_read_times_the_first_tokens_and_the_whole(tmp_path):
    printed = start("bench_read", "--quick", "--rule", "rms", "--json", tmp_path / "bench.json")
    result = json.loads((tmp_path / "bench.json").read_text())
    token, coloured, total = (result["seconds"][name]["median"] for name in result["seconds"])
    assert 0 < token <= coloured <= total
    assert (result["runs"], result["rule"]) == (2, "rms")
    assert 200 <= result["words"] < 250
    assert "first coloured token" in printed


@pytest.mark.slow
def test_kill_matrix_kills_a_stage_and_the_result_is_the_right_one(tmp_path):
    """A small part of the matrix: two stages, a few of their operations on files, and two random moments."""
    stages = ["--stages", "tune", "train --overwrite"]
    printed = start("kill_matrix", *stages, "--points", "4", "--random", "2", "--json", tmp_path / "kills.json")
    for row in json.loads((tmp_path / "kills.json").read_text()):
        assert row["kills"] == 6
        assert row["operations"] > 5
        ways = ("resumed", "begun again", "was finished", "ended before")
        assert (sum(row[way] for way in ways), row["failures"]) == (6, [])
    assert "every kill left one generation" in printed


def test_bench_train_compares_two_forms_of_the_loss(run, tmp_path):
    printed = run("bench_train", "--quick", "--rounds", "2", "--batch", "4", "--json", tmp_path / "bench.json")
    rows = {row["form"]: row for row in json.loads((tmp_path / "bench.json").read_text())["models"]["small"]}
    assert set(rows) == {"fp32 plain", "fp32 fused", "bf16 plain", "bf16 fused"}
    assert rows["fp32 plain"]["times_plain"] == 1
    assert abs(rows["fp32 fused"]["loss"] - rows["fp32 plain"]["loss"]) < 1e-4
    assert "× plain" in printed


def test_ship_packs_a_run_that_reads_as_the_run_does(run, finished, tmp_path):
    kit = tmp_path / "kit"
    assert "bytes" in run("ship", finished[1], "wikipedia", kit)
    text = json.loads((finished[1].parent / "docs.jsonl").read_text().splitlines()[0])["text"]
    of_run, of_kit = (dynlm.Reader.from_pretrained(str(folder)).read(text) for folder in (finished[1], kit))
    assert [token.text for token in of_kit.tokens] == [token.text for token in of_run.tokens]
    for loss in ("static", "adapted"):  # float16
        of_both = ([getattr(token, loss) for token in reading.tokens] for reading in (of_kit, of_run))
        assert next(of_both) == pytest.approx(next(of_both), abs=2e-3)
    assert of_kit.gain == pytest.approx(of_run.gain, abs=2e-3)
    assert load_session(kit).held() == load_session(finished[1]).held()
    found = json.loads((finished[1] / "evaluate" / "results.json").read_text())["methods"]
    card = (kit / "README.md").read_text()
    assert all(f"| {name} | {figures['bits_per_byte']:.4f} |" in card for name, figures in found.items())
    assert "CC BY-SA 3.0" in (kit / "LICENSE.md").read_text()


STRETCH = re.compile(r'(?:<g class="(\w)(\d)"><rect [^>]*/>)?<text xml:space="preserve" [^>]*>([^<]*)<')


def test_the_picture_of_the_readme_is_what_the_shipped_model_reads(run, tmp_path):
    """Character by character, but for rounding, which may move a gain over the bound of a shade."""
    run("picture", tmp_path / "picture.svg")
    shades = []
    for path in (SCRIPTS.parent / "docs" / "picture.svg", tmp_path / "picture.svg"):
        text = path.read_text(encoding="utf-8")
        assert len(text) < 100_000
        stretches = STRETCH.findall(text.partition("gain in nats")[0])
        levels = [
            int(size or 0) * (-1 if kind == "w" else 1) for kind, size, shown in stretches for _ in unescape(shown)
        ]
        shades.append(("".join(unescape(shown) for *_, shown in stretches), levels))
    (words, old), (same_words, new) = shades
    assert words == same_words
    assert "".join(words.split()) == "".join((SCRIPTS.parent / "docs" / "picture.txt").read_text().split())
    moved = [abs(a - b) for a, b in zip(old, new, strict=True)]
    assert max(moved) <= 1, "run scripts/picture"
    assert sum(moved) <= 0.02 * len(moved), "run scripts/picture"
    assert old.count(4) > 50  # names that came again


def test_reproduce_puts_what_a_piece_finds_beside_what_is_published(run, tmp_path):
    listed = run("reproduce", "--list")
    assert all(name in listed for name in ("wikipedia", "wikitext2", "sinusoid", "meta"))
    printed = start("reproduce", "--quick", "--only", "reading", "--out", tmp_path)
    rows = json.loads((tmp_path / "figures.json").read_text())["reading"]
    assert rows["gated: × static"]["published"] == 5.49
    assert rows["gated: × static"]["found"] > 1
    assert "gated: × static" in printed
    again = run("reproduce", "--quick", "--only", "reading", "--out", tmp_path)
    assert "bench_reading" not in again  # finished before
