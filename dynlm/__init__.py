"""dynlm: language models that keep learning while they read.

The public names load their modules when first used; importing the package runs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

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
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        module, _, attribute = _HOME[name].partition(":")
        return getattr(importlib.import_module(module), attribute or name)
    raise AttributeError(f"module 'dynlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_HOME, "__version__"]
