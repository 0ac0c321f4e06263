"""What type checkers see of the public names: mypy checks this file, and nothing runs it.

``assert_type`` fails for a name whose type is Any.
"""

from pathlib import Path
from typing import assert_type

import torch
from transformers import PreTrainedModel

import dynlm
import dynlm.optim
from dynlm.data.articles import Corpus, DataConfig
from dynlm.evaluation.audit import Verdict
from dynlm.models.lstm import LSTMConfig
from dynlm.optim.base import Shared
from dynlm.session.step import Step


def reading(texts: list[str]) -> None:
    reader = assert_type(dynlm.Reader.from_pretrained("wikitext2", rule="rms"), dynlm.Reader)
    reading = assert_type(reader.read(*texts), dynlm.Reading)
    assert_type(reading.gain, float)
    for step in reader.steps(texts[0]):
        assert_type(step, Step)
        assert_type(step.log_probs(), torch.Tensor)
        assert_type(step.before, dict[str, torch.Tensor])
    with reader.adapted() as model:
        assert_type(model, PreTrainedModel)


def learning(model: PreTrainedModel, articles: list[dynlm.Article]) -> None:
    results = assert_type(dynlm.evaluate(model, articles, ["static", "rms"]), dynlm.Results)
    assert_type(results.table(), str)
    rule = assert_type(dynlm.tune(model, articles, "rms"), dynlm.Rule)
    assert_type(dynlm.meta_train("run", articles, rule, steps=10, trackers=["tensorboard"]), dynlm.Rule)
    assert_type(dynlm.audit("run", articles[0], articles[1]), list[Verdict])


def rules() -> list[dynlm.Rule]:
    assert_type(dynlm.rules.SGD(lr=0.1).lr, torch.nn.Parameter)
    assert_type(dynlm.optim.load("general"), dynlm.Rule)
    assert_type(dynlm.optim.save_pretrained(dynlm.rules.Adam(), "folder"), Path)
    assert_type(dynlm.optim.push_to_hub(dynlm.rules.Adam(), "name"), str)
    assert_type(dynlm.optim.scalar(0.1), torch.nn.Parameter)
    assert_type(dynlm.optim.Range(1e-4, 1.0, 1e-2, "direction").times(2), dynlm.optim.Range)
    dynlm.optim.register(dynlm.rules.SGD, {"lr": dynlm.optim.Range(1e-4, 1.0, 1e-2)})
    assert_type(dynlm.rules.RMS().save_pretrained("folder"), Path)
    assert_type(dynlm.rules.RMS().push_to_hub("user/rule"), str)
    return [dynlm.rules.RMS(), dynlm.rules.Gated(), assert_type(dynlm.rules.from_pretrained("folder"), dynlm.Rule)]


def context(shared: Shared) -> torch.Tensor:
    return assert_type(dynlm.optim.columns(shared, shared.step), torch.Tensor)


def loading() -> None:
    assert_type(dynlm.load_model("folder"), PreTrainedModel)
    assert_type(dynlm.load_corpus(DataConfig()), Corpus)
    assert_type(dynlm.load_corpus("my/*.txt", meta_articles=8), Corpus)
    assert_type(dynlm.LSTMForCausalLM(LSTMConfig()), dynlm.LSTMForCausalLM)
    assert_type(dynlm.InputError("one line"), dynlm.InputError)


def training(model: torch.nn.Module) -> None:
    optimizer: torch.optim.Optimizer = dynlm.LearnedOptimizer(model.parameters())
    assert_type(dynlm.optim.LearnedOptimizer(model.parameters()), dynlm.LearnedOptimizer)
    optimizer.step()
