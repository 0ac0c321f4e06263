"""Small real pieces of the tests of LearnedOptimizer: every rule, parameters of all shapes, their gradients."""

import pytest
import torch
from torch import nn

from dynlm.optim import LearnedOptimizer
from dynlm.optim.library import make_rule
from support import rules
from support.rules import FORMULAS, LEARNING, RULES

SLOTTED = [name for name in LEARNING if name not in ("sgd", "rms", "linear")]
SEE_SURPRISE = ["gated", "diagonal", "mlp", "lstm", "gru"]
SHAPES = {"table": (7, 3), "kernel": (2, 3, 2, 2), "bias": (5,), "scale": ()}
for_rules = pytest.mark.parametrize("name", LEARNING)


def moved(name):
    """A rule for tensors that it does not know, away from where it starts."""
    rule = make_rule(name, **{"lr": 0.01, **RULES[name]} if name in SEE_SURPRISE else RULES[name])
    return rule if name in FORMULAS else rules.moved(rule, 0.1)


def make_parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES.values()]


def gradients(step, size=0.1):
    generator = torch.Generator().manual_seed(100 + step)
    return [size * torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES.values()]


def give(parameters, step, size=0.1):
    for p, grad in zip(parameters, gradients(step, size), strict=True):
        p.grad = grad.to(p.dtype)


def run(optimizer, parameters, steps, losses=True):
    for step in steps:
        give(parameters, step)
        optimizer.step((lambda loss=3.0 + step % 3: loss) if losses else None)
    return [p.detach().clone() for p in parameters]


def trained(name, steps=4, dtype=torch.float64, **options):
    parameters = make_parameters(dtype)
    optimizer = LearnedOptimizer(parameters, moved(name), **options)
    run(optimizer, parameters, range(steps))
    return optimizer, parameters


def same(a, b, tolerance=0.0):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=tolerance, atol=tolerance)


def assert_same_state(a, b):
    for p, q in zip(a["state"].values(), b["state"].values(), strict=True):
        assert p.keys() == q.keys()
        for key, value in p.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(q[key])), key
    for group, other in zip(a["param_groups"], b["param_groups"], strict=True):
        assert repr(group) == repr(other)


def as_matrix(t):
    return t.reshape(t.shape[0], -1) if t.dim() > 1 else t.reshape(1, -1)
