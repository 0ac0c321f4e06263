"""The notebooks of examples/ run from their first cell to their last, and show what their text says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dynlm.data.stdlib import load_topics

pytest.importorskip("nbclient", reason="nbclient is not installed: pip install dynlm[dev]")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install dynlm[dev]")
ROOT = Path(__file__).parents[1]


def execute(name, folder, settings):
    """Run a notebook as scripts/notebooks does; gives what each of its code cells printed, and how many figures."""
    command = [sys.executable, ROOT / "scripts" / "notebooks", name]
    arguments = ["--settings", json.dumps(settings), "--folder", folder]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not re.search(r"(Deprecation|Future|User|Runtime)Warning", done.stderr)
    cells = json.loads((folder / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert not any(output.get("name") == "stderr" for output in outputs)
    printed = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    return printed, sum("image/png" in output.get("data", {}) for output in outputs)


def test_a_name_is_learned_and_forgotten(tmp_path):
    article = (ROOT / "examples" / "vaskerholt.txt").read_text(encoding="utf-8")
    (tmp_path / "short.txt").write_text("\n".join(article.split("\n")[:5]), encoding="utf-8")
    printed, figures = execute("watch_a_model_learn_a_name", tmp_path, {"ARTICLE": "short.txt"})
    losses = re.findall(r"Sallowmere, (\d): +(\S+) nats without learning, +(\S+) with it", printed)
    assert [int(number) for number, *_ in losses] == [1, 2, 3, 4]
    assert float(losses[0][2]) > 30
    assert float(losses[3][2]) < float(losses[3][1]) / 2
    asked = re.findall(r"after (.*): +(\S+) nats without learning, +(\S+) with it", printed)
    (_, static, own), (_, _, other), (_, nothing, same) = asked
    assert float(own) < float(static) / 2 < float(other)
    assert nothing == same
    assert "bit for bit: True" in printed
    assert figures == 2


def test_a_rule_is_trained_and_kept(tmp_path):
    rows = [{"title": a.title, "text": a.text[:500]} for a in load_topics()[:24]]
    (tmp_path / "articles.jsonl").write_text("\n".join(map(json.dumps, rows)))
    few = {"DATA": "articles.jsonl", "ARTICLES": 4, "TEST_ARTICLES": 2, "TRIALS": 2, "STEPS": 2, "TRUNCATION": 6}
    printed, figures = execute("train_your_own_rule", tmp_path, few)
    assert "4 articles to train on, 2 to test on" in printed
    gains = {name: float(gain) for name, gain in re.findall(r"^ *(\S+) .*gain (\S+) \[", printed, re.MULTILINE)}
    assert set(gains) == {"static", "gated", "rms", "gated-2"}
    assert min(gain for name, gain in gains.items() if name != "static") > 0.1
    assert "reads as the one in memory: True" in printed
    assert figures == 3
    assert (tmp_path / "runs/own-rule/report.html").is_file()
    assert (tmp_path / "runs/own-rule/shared/rule.safetensors").is_file()


def test_kept_outputs_are_of_whole_runs():
    """A notebook is written after its last cell, or without any output."""
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        counts = [cell["execution_count"] for cell in cells]
        assert counts in ([None] * len(cells), list(range(1, len(cells) + 1)))
        assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
