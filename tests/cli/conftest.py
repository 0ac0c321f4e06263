"""A whole small run that the tests of commands share: a real text, every stage once."""

import json
import shutil

import pytest

from dynlm.cli.main import main

STEPS = ("train", "tune", "meta-train", "evaluate")
RECIPE = """
[data]
source = "{source}"
meta_articles = 6
held_out = 3
[tokenizer]
vocab_size = 400
[model]
embedding_size = 12
hidden_size = 12
[train]
epochs = 1
batch_size = 4
segment = 16
precision = "fp32"
[prior]
tokens = 1024
[tune]
rules = ["rms", "sgd"]
trials = 4
articles = 2
max_tokens = 256
[meta]
steps = 2
articles = 1
truncation = 4
validate_every = 1
validation_articles = 2
hidden = 2
[meta.estimator]
coordinates = 500
[evaluate]
methods = ["static", "sgd", "rms", "gated"]
"""


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(recipe file, run directory) after the whole chain, on a few articles of Python's own documentation."""
    from dynlm.data.articles import DataConfig, read_pools

    folder = tmp_path_factory.mktemp("chain")
    rows = [{"title": a.title, "text": a.text[:3000]} for a in read_pools(DataConfig())["all"][:40]]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(source=folder / "docs.jsonl"))
    run = folder / "run"
    for command in STEPS:
        assert main([command, str(recipe), "--run", str(run)]) == 0
    return recipe, run


@pytest.fixture
def plain_reports(monkeypatch):
    """Reports without their charts, which take most of the time and have tests of their own."""
    monkeypatch.setattr("dynlm.report.svg.Drawing.html", lambda drawing: f"<p>{drawing.name}</p>")


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to break."""
    recipe, run = finished
    shutil.copytree(run, tmp_path / "run")
    return recipe, tmp_path / "run"
