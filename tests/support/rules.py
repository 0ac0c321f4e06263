"""One table of all rules: how tests make each of them, small, and away from where it starts.

A rule that joins dynlm/optim/registry.py joins this table, and with it every test that goes over rules.
"""

import torch

from dynlm.optim import registry
from dynlm.optim.library import make_rule

SETTINGS = {"lr": 3e-2, "eps": 1e-3, "decay": 1e-2}
RULES = {
    "static": {},
    "sgd": {"lr": 0.3, "decay": 0.01},
    "rms": SETTINGS,
    "adam": {"lr": 0.02, "eps": 1e-3, "decay": 0.01},
    "linear": {"weight": -0.2, "bias": 0.05},
    "gated": {"hidden": 3},
    "diagonal": {"hidden": 3},
    "lstm": {"hidden": 3},
    "gru": {"hidden": 3},
    "mlp": {"hidden": 3, "tensor_hidden": 2},
    "general": {},
}
"""arguments of a rule, or sizes of a cell, whose other settings are where it starts"""
FORMULAS = ("static", "sgd", "rms", "adam", "linear")
"""rules whose numbers are all in the table: they need no moving"""
LEARNING = [name for name in RULES if name != "static"]
READING = [name for name in LEARNING if name != "general"]
"""rules for reading, which know θ0 and the static RMS"""


def moved(rule, size=0.2):
    """Away from its start, so that every part of it counts.

    Not further: reading would turn chaotic, and rounding grow from segment to segment.
    """
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return rule


def make(name, priors, dtype=torch.float64):
    """The rule of this name for a model with these tensors; a cell starts at SETTINGS and is moved from there."""
    if name in FORMULAS:
        return make_rule(name, **RULES[name])
    row = registry.RULES[name]
    rule = row.rule.started_at(SETTINGS, priors, **RULES[name]) if row.start else make_rule(name, **RULES[name])
    return moved(rule.to(dtype))
