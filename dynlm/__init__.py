"""dynlm: language models that keep learning while they read.

The public names load their modules when first used; importing the package runs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "RMS",
    "SGD",
    "Adam",
    "Gated",
    "InputError",
    "LSTMForCausalLM",
    "LearnedOptimizer",
    "ReadConfig",
    "Reader",
    "Rule",
    "load_corpus",
    "load_model",
    "load_rule",
    "measure_priors",
    "scorer_for",
]

if TYPE_CHECKING:  # what type checkers and editors see; at run time __getattr__ finds the same names
    from dynlm.adapt import ReadConfig as ReadConfig
    from dynlm.adapt import Reader as Reader
    from dynlm.adapt import measure_priors as measure_priors
    from dynlm.data.articles import load_corpus as load_corpus
    from dynlm.models.causal import load_model as load_model
    from dynlm.models.causal import scorer_for as scorer_for
    from dynlm.models.lstm import LSTMForCausalLM as LSTMForCausalLM
    from dynlm.optim.base import Rule as Rule
    from dynlm.optim.gated import Gated as Gated
    from dynlm.optim.handmade import RMS as RMS
    from dynlm.optim.handmade import SGD as SGD
    from dynlm.optim.handmade import Adam as Adam
    from dynlm.optim.hub import load as load_rule
    from dynlm.optim.torch_optimizer import LearnedOptimizer as LearnedOptimizer
    from dynlm.types import InputError as InputError
else:
    _HOME = {
        "Reader": "dynlm.adapt",
        "ReadConfig": "dynlm.adapt",
        "measure_priors": "dynlm.adapt",
        "LSTMForCausalLM": "dynlm.models.lstm",
        "scorer_for": "dynlm.models.causal",
        "load_model": "dynlm.models.causal",
        "Rule": "dynlm.optim.base",
        "SGD": "dynlm.optim.handmade",
        "RMS": "dynlm.optim.handmade",
        "Adam": "dynlm.optim.handmade",
        "Gated": "dynlm.optim.gated",
        "LearnedOptimizer": "dynlm.optim.torch_optimizer",
        "load_rule": "dynlm.optim.hub:load",
        "load_corpus": "dynlm.data.articles",
        "InputError": "dynlm.types",
    }

    def __getattr__(name):
        if name in _HOME:
            module, _, attribute = _HOME[name].partition(":")
            return getattr(importlib.import_module(module), attribute or name)
        raise AttributeError(f"module 'dynlm' has no attribute {name!r}")

    def __dir__():
        return [*__all__, "__version__"]
