"""A few updates of two small tensors, plain and in place."""

import torch

from dynlm.optim.base import Prior
from dynlm.optim.kernel import InPlaceUpdate

SHAPES = {"embedding.weight": (17, 5), "bias": (1, 40)}


def make_priors(dtype):
    generator = torch.Generator().manual_seed(0)
    priors = []
    for name, shape in SHAPES.items():
        theta0 = torch.randn(shape, generator=generator, dtype=dtype)
        rms = torch.rand(shape, generator=generator, dtype=dtype) * 1e-2
        rms[0, :3] = 0.0  # weights that never saw a gradient
        priors.append(Prior(name, theta0, rms, float(rms.mean()), 200.0))
    return priors


def grads_at(priors, step):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.theta0.shape, generator=generator, dtype=p.theta0.dtype) * 1e-2 for p in priors]


def run_plain(rule, priors, n_steps):
    thetas, state = [p.theta0 for p in priors], rule.init(priors)
    for step in range(n_steps):
        state.clock.tick(3.0 + step % 3)
        thetas, state = rule.update(thetas, grads_at(priors, step), state, priors)
    return thetas, state


def run_fused(rule, priors, n_steps, compiled):
    thetas, state, fused = [p.theta0.clone() for p in priors], rule.init(priors), InPlaceUpdate(rule, compiled)
    for step in range(n_steps):
        state.clock.tick(3.0 + step % 3)
        fused(thetas, grads_at(priors, step), state, priors)
    return thetas, state


def assert_fused_is_plain(rule, priors, compiled, tolerance):
    """Seven updates: weights and memory of the fused step are those of the plain one."""
    with torch.no_grad():
        plain, plain_state = run_plain(rule, priors, 7)
    fused, fused_state = run_fused(rule, priors, 7, compiled)
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
    for a_slots, b_slots in zip(plain_state.slots, fused_state.slots, strict=True):
        for a, b in zip(a_slots, b_slots, strict=True):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
