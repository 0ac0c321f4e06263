"""Online update rules, hand-made and learned, behind one contract.

The public names load their modules when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "LearnedOptimizer": "dynlm.optim.torch_optimizer",
    "load": "dynlm.optim.hub",
    "save_pretrained": "dynlm.optim.hub",
    "push_to_hub": "dynlm.optim.hub",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dynlm.optim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
