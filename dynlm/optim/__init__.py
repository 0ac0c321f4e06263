"""Online update rules, hand-made and learned, behind one contract.

The public names load their modules when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynlm.lazy import lazy

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
    __getattr__ = lazy(
        __name__,
        {
            "dynlm.optim.base": ("columns",),
            "dynlm.optim.handmade": ("scalar",),
            "dynlm.optim.hub": ("load",),
            "dynlm.optim.registry": ("Range", "register"),
            "dynlm.optim.sharing": ("push_to_hub", "save_pretrained"),
            "dynlm.optim.torch_optimizer": ("LearnedOptimizer",),
        },
    )

    def __dir__():
        return [*globals(), *__all__]
