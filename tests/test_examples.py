"""Each program in examples/ runs on little text, prints what it says, and uses public names only."""

import ast
import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

import dynlm
from dynlm.data.stdlib import load_topics

FOLDER = Path(__file__).parents[1] / "examples"
PROGRAMS = sorted(FOLDER.glob("*.py"))
LINE = r"^ *(\S+) .*gain ([+-]\d\.\d+) \[([+-]\d\.\d+|\+nan), ([+-]\d\.\d+|\+nan)\]"


@pytest.fixture(scope="module")
def articles(tmp_path_factory):
    """A file of short articles of the documentation that Python carries."""
    path = tmp_path_factory.mktemp("articles") / "articles.jsonl"
    rows = [{"title": a.title, "text": a.text[:600]} for a in load_topics()[:24]]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a program of examples/ in an empty folder; gives what it printed and the names that it leaves."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        names = runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out, names

    return run


def gains(printed):
    """The gain of each method in a table of results, with its interval."""
    return {name: tuple(map(float, numbers)) for name, *numbers in re.findall(LINE, printed, re.MULTILINE)}


def test_a_text_is_read_and_its_page_written(run, tmp_path):
    printed, _ = run("own_text.py")
    gain = float(re.search(r"gain (\S+) nats per token", printed).group(1))
    before, after = map(float, re.search(r"byte: (\S+) without learning, (\S+) with it", printed).groups())
    assert gain > 0.8
    assert before > 1.2 * after
    (row,) = re.findall(r"Sallowmere +(.*)", printed)
    pairs = [tuple(map(float, pair.split("→"))) for pair in row.split("   ")]
    assert len(pairs) == 3
    assert pairs[0][1] > 25  # nats of a name that nobody has seen
    assert pairs[2][1] < pairs[2][0] - 8  # nats
    page = (tmp_path / "page.html").read_text()
    assert page.endswith("</html>")
    assert "Sallow" in page


def test_a_model_of_transformers_is_tuned_evaluated_and_reported(run, ready, articles, tmp_path):
    printed, _ = run("own_model.py", ready[1], articles, "--params", "*mlp*", "--articles", 4, "--trials", 4)
    found = gains(printed)
    assert list(found) == ["static", "rms"]
    gain, low, high = found["rms"]
    assert 0 < low < gain < high
    results = json.loads((tmp_path / "runs/own-model/evaluate/results.json").read_text())
    assert results["articles"] == 3  # an eighth of 24
    assert results["model"]["adapted"] < 0.6 * results["model"]["parameters"]
    assert f"{results['methods']['rms']['gain_nats_per_token']:+.4f}" == f"{gain:+.4f}"
    assert (tmp_path / "runs/own-model/report.html").read_text().rstrip().endswith("</html>")


@pytest.mark.usefixtures("own_rules")
def test_a_rule_of_one_class_is_tuned_and_compared(run, articles):
    printed, names = run("own_rule.py", articles, "--articles", 2, "--trials", 2)
    found = gains(printed)
    assert set(found) == {"static", "rms", "momentum"}
    assert found["momentum"][0] > 0.1
    assert dynlm.optim.load("momentum").settings().keys() == names["tuned"][1].settings().keys()


def test_the_trainer_takes_the_learned_optimizer_in_the_place_of_adamw(run, articles):
    losses = {}
    for optimizer in ("learned", "adamw"):
        printed, names = run("trainer.py", articles, "--optimizer", optimizer, "--steps", 16)
        assert names["trainer"].state.global_step == 16
        losses[optimizer] = float(re.search(rf"{optimizer}: (\S+) bits per byte", printed).group(1))
    assert isinstance(names["trainer"].optimizer.optimizer, names["OPTIMIZERS"]["adamw"])
    assert all(loss < 5.5 for loss in losses.values()), losses  # of 8 at first
    assert losses["learned"] != losses["adamw"]


def test_a_gated_rule_is_meta_trained_saved_and_loaded(run, articles, tmp_path):
    few = ("--articles", 4, "--trials", 2, "--steps", 2, "--truncation", 6)
    printed, _ = run("meta_training.py", articles, *few)
    found = gains(printed)
    assert set(found) == {"static", "rms", "gated"}
    rule = dynlm.optim.load(tmp_path / "runs/meta-training/shared")
    assert rule.made["progress"]["step"] == 2
    assert rule.made["config"]["truncation"] == 6
    log = [json.loads(line) for line in (tmp_path / "runs/meta-training/meta-train.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2]


@pytest.mark.parametrize("path", PROGRAMS, ids=[path.name for path in PROGRAMS])
def test_programs_are_short_and_public(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    for node in ast.walk(ast.parse(text)):
        imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.startswith("dynlm.") for name in imported)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "dynlm":
            assert node.module in ("dynlm", "dynlm.optim")
            assert {alias.name for alias in node.names} <= set(importlib.import_module(node.module).__all__)


def test_there_are_five_programs():
    assert [path.stem for path in PROGRAMS] == ["meta_training", "own_model", "own_rule", "own_text", "trainer"]
