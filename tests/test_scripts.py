"""The scripts that the README names run, and write what they say."""

import json
import subprocess
import sys
from pathlib import Path

from dynlm.runs import Run, write_json

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(name, *arguments):
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)


def test_bench_reading_times_every_rule_against_static(tmp_path):
    printed = run("bench_reading", "--quick", "--threads", "1", "--json", tmp_path / "bench.json").stdout
    result = json.loads((tmp_path / "bench.json").read_text())
    assert set(result["rules"]) == {"static", "sgd", "rms", "adam", "gated"}
    assert result["rules"]["static"]["times_static"] == 1
    assert result["rules"]["gated"]["times_static"] > result["rules"]["sgd"]["times_static"] > 1
    assert "× static" in printed


def test_figure_is_an_svg_of_its_own(tmp_path):
    bins = [{"from": 0, "to": 32, "tokens": 64, "articles": 2, "gain": 0.1, "ci95": [0.0, 0.2]}]
    methods = {"static": {"word_ppl": 9.0}, "rms": {"word_ppl": 8.0, "gain_by_position": bins}}
    write_json(Run(tmp_path).results, {"methods": methods})
    run("figure", tmp_path, tmp_path / "gain.svg")
    assert (tmp_path / "gain.svg").read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')
