"""What type checkers see of the public names: mypy checks this file, and nothing runs it.

``assert_type`` fails for a name whose type is Any.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import torch
from transformers import PreTrainedModel

import dynlm
import dynlm.optim
from dynlm.data.articles import Corpus, DataConfig
from dynlm.models.causal import CausalScorer, LSTMScorer
from dynlm.models.lstm import LSTMConfig
from dynlm.optim.base import Prior, Shared
from dynlm.types import TokenizedArticle


def reading(
    model: dynlm.LSTMForCausalLM, article: TokenizedArticle, pieces: Iterator[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    score = assert_type(dynlm.scorer_for(model), LSTMScorer | CausalScorer)
    priors = assert_type(dynlm.measure_priors(model, score, pieces), list[Prior])
    config = assert_type(dynlm.ReadConfig(segment=16), dynlm.ReadConfig)
    reader = assert_type(dynlm.Reader(model, score, dynlm.RMS(), priors, config), dynlm.Reader)
    assert_type(reader.read(article, 0), torch.Tensor)


def rules() -> list[dynlm.Rule]:
    assert_type(dynlm.SGD(lr=0.1).lr, torch.nn.Parameter)
    assert_type(dynlm.optim.load("general"), dynlm.Rule)
    assert_type(dynlm.optim.save_pretrained(dynlm.Adam(), "folder"), Path)
    assert_type(dynlm.optim.push_to_hub(dynlm.Adam(), "name"), str)
    assert_type(dynlm.optim.scalar(0.1), torch.nn.Parameter)
    assert_type(dynlm.optim.Range(1e-4, 1.0, 1e-2, "direction").times(2), dynlm.optim.Range)
    dynlm.optim.register(dynlm.SGD, {"lr": dynlm.optim.Range(1e-4, 1.0, 1e-2)})
    return [dynlm.RMS(), dynlm.Adam(), dynlm.Gated(), assert_type(dynlm.load_rule("folder"), dynlm.Rule)]


def context(shared: Shared) -> torch.Tensor:
    return assert_type(dynlm.optim.columns(shared, shared.step), torch.Tensor)


def loading() -> None:
    assert_type(dynlm.load_model("folder"), PreTrainedModel)
    assert_type(dynlm.load_corpus(DataConfig()), Corpus)
    assert_type(dynlm.LSTMForCausalLM(LSTMConfig()), dynlm.LSTMForCausalLM)
    assert_type(dynlm.InputError("one line"), dynlm.InputError)


def training(model: torch.nn.Module) -> None:
    optimizer: torch.optim.Optimizer = dynlm.LearnedOptimizer(model.parameters())
    assert_type(dynlm.optim.LearnedOptimizer(model.parameters()), dynlm.LearnedOptimizer)
    optimizer.step()
