"""Fixtures of all tests."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from chain import run_chain
from dynlm.optim.registry import RULES
from lab import make_lab
from shared import shared


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and one thread makes sums repeatable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def wikitext2():
    """The folder of WikiText-2, or a visible skip."""
    folder = os.environ.get("DYNLM_WIKITEXT2")
    if not folder:
        pytest.skip("DYNLM_WIKITEXT2 is not set: point it at the folder of wiki.train.tokens")
    return Path(folder)


@pytest.fixture
def own_rules():
    """Rules that the test registers are forgotten after it."""
    known = dict(RULES)
    yield
    RULES.clear()
    RULES.update(known)


@pytest.fixture
def lab():
    return make_lab()


READY = """
[data]
source = "{source}"
meta_articles = 6
held_out = 3
[model]
pretrained = "{model}"
[read]
segment = 16
[prior]
tokens = 512
[tune]
rules = ["rms"]
trials = 2
articles = 2
max_tokens = 64
[meta]
steps = 1
articles = 1
truncation = 4
validate_every = 1
validation_articles = 1
hidden = 2
[meta.estimator]
coordinates = 500
[evaluate]
methods = ["static", "rms", "gated"]
max_articles = 1
"""


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(recipe file, run directory) after the whole chain, on a few articles of Python's own documentation."""
    from dynlm.data.stdlib import load_topics

    rows = [{"title": a.title, "text": a.text[:1500]} for a in load_topics()[:40]]
    made = shared(tmp_path_factory, "chain", lambda folder: run_chain(folder, rows))
    folder = tmp_path_factory.mktemp("finished") / "chain"
    shutil.copytree(made, folder)
    for path in (folder / "recipe.toml", folder / "run" / "recipe.json"):
        path.write_text(path.read_text().replace(str(made), str(folder)))
    return folder / "recipe.toml", folder / "run"


@pytest.fixture
def plain_reports(monkeypatch):
    """Reports without their charts, which take most of the time and have tests of their own."""
    from dynlm.report import svg

    monkeypatch.setattr(svg.Drawing, "html", lambda drawing: f"<p>{drawing.name}</p>")


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to break."""
    recipe, run = finished
    shutil.copytree(run, tmp_path / "run")
    return recipe, tmp_path / "run"


@pytest.fixture(scope="session")
def ready(tmp_path_factory):
    """(recipe file, model folder): a tiny GPT-2 beside a byte-level tokenizer, and real text in short articles."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from dynlm.data.stdlib import load_topics

    folder = tmp_path_factory.mktemp("ready")
    rows = [{"title": a.title, "text": a.text[:800]} for a in load_topics()[:20]]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([row["text"] for row in rows], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(folder / "model")
    torch.manual_seed(1)
    size = {"vocab_size": 300, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(folder / "model")
    (folder / "recipe.toml").write_text(READY.format(source=folder / "docs.jsonl", model=folder / "model"))
    return folder / "recipe.toml", folder / "model"
