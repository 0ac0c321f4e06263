"""Online update rules, hand-made and learned, behind one contract.

The public names load their modules when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__all__ = ["LearnedOptimizer", "Range", "columns", "load", "push_to_hub", "register", "save_pretrained", "scalar"]

if TYPE_CHECKING:  # what type checkers and editors see; at run time __getattr__ finds the same names
    from dynlm.optim.base import columns as columns
    from dynlm.optim.handmade import scalar as scalar
    from dynlm.optim.hub import load as load
    from dynlm.optim.registry import Range as Range
    from dynlm.optim.registry import register as register
    from dynlm.optim.sharing import push_to_hub as push_to_hub
    from dynlm.optim.sharing import save_pretrained as save_pretrained
    from dynlm.optim.torch_optimizer import LearnedOptimizer as LearnedOptimizer
else:
    _HOME = dict.fromkeys(("push_to_hub", "save_pretrained"), "dynlm.optim.sharing") | {"load": "dynlm.optim.hub"}
    _HOME |= {"LearnedOptimizer": "dynlm.optim.torch_optimizer", "columns": "dynlm.optim.base"}
    _HOME |= {"scalar": "dynlm.optim.handmade", "Range": "dynlm.optim.registry", "register": "dynlm.optim.registry"}

    def __getattr__(name):
        if name in _HOME:
            return getattr(importlib.import_module(_HOME[name]), name)
        raise AttributeError(f"module 'dynlm.optim' has no attribute {name!r}")

    def __dir__():
        return [*globals(), *_HOME]
