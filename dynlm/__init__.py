"""dynlm: language models that keep learning while they read.

The public names load their modules when first used; importing the package runs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynlm.lazy import lazy

__version__ = "0.1.0"

__all__ = [
    "Article",
    "InputError",
    "LSTMForCausalLM",
    "LearnedOptimizer",
    "Reader",
    "Reading",
    "Results",
    "Rule",
    "audit",
    "evaluate",
    "load_corpus",
    "load_model",
    "meta_train",
    "rules",
    "tune",
]

if TYPE_CHECKING:  # what type checkers and editors see; at run time __getattr__ finds the same names
    from dynlm import rules as rules
    from dynlm.data.articles import load_corpus as load_corpus
    from dynlm.models.causal import load_model as load_model
    from dynlm.models.lstm import LSTMForCausalLM as LSTMForCausalLM
    from dynlm.optim.base import Rule as Rule
    from dynlm.optim.torch_optimizer import LearnedOptimizer as LearnedOptimizer
    from dynlm.session.api import audit as audit
    from dynlm.session.api import evaluate as evaluate
    from dynlm.session.api import meta_train as meta_train
    from dynlm.session.api import tune as tune
    from dynlm.session.evaluation import Results as Results
    from dynlm.session.reader import Reader as Reader
    from dynlm.session.reading import Reading as Reading
    from dynlm.types import Article as Article
    from dynlm.types import InputError as InputError
else:
    __getattr__ = lazy(
        __name__,
        {
            "dynlm.data.articles": ("load_corpus",),
            "dynlm.models.causal": ("load_model",),
            "dynlm.models.lstm": ("LSTMForCausalLM",),
            "dynlm.optim.base": ("Rule",),
            "dynlm.optim.torch_optimizer": ("LearnedOptimizer",),
            "dynlm.rules": (),
            "dynlm.session.api": ("audit", "evaluate", "meta_train", "tune"),
            "dynlm.session.evaluation": ("Results",),
            "dynlm.session.reader": ("Reader",),
            "dynlm.session.reading": ("Reading",),
            "dynlm.types": ("Article", "InputError"),
        },
    )

    def __dir__():
        return [*__all__, "__version__"]
