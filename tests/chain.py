"""A whole small run: what the tests of commands share, and what the golden numbers are taken from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

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
gate_articles = 1
"""


def run_chain(folder: Path, articles: Sequence[dict[str, str]], *flags: str) -> tuple[Path, Path]:
    """Every stage once on rows of title and text; returns (recipe file, run directory), both in ``folder``."""
    from dynlm.cli.main import main

    recipe, run = folder / "recipe.toml", folder / "run"
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, articles)))
    recipe.write_text(RECIPE.format(source=folder / "docs.jsonl"))
    for command in STEPS:
        code = main([command, str(recipe), "--run", str(run), *flags])
        assert code == 0, f"{command} ended with {code}"
    return recipe, run
