"""The general-purpose rule: the scale of the loss and of the weights, its statistics in C and torch, long runs."""

import pytest
import torch

from dynlm.optim.base import Clock, Prior
from dynlm.optim.general import General, _means, _means_in_c
from dynlm.optim.kernel import InPlaceUpdate

SHAPES = [(5, 7), (1, 30), (60, 40), (1, 1)]


def away(seed=0):
    """Off its start, so that every part counts."""
    rule, generator = General(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in rule.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return rule


def draw(shapes, scale=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def run(rule, thetas, grad_of, steps):
    """In place; ``grad_of(theta, tensor, step)``."""
    priors = [Prior("", t, t, 1.0, 1.0) for t in thetas]
    state, fused = rule.init(priors), InPlaceUpdate(rule)
    state.clock = Clock()
    for step in range(steps):
        state.clock.tick(float("nan"))
        fused(thetas, [grad_of(t, i, step) for i, t in enumerate(thetas)], state, priors)
    return thetas


def noisy(theta, i, step):
    generator = torch.Generator().manual_seed(1000 * step + i)
    return theta + torch.randn(theta.shape, generator=generator, dtype=theta.dtype)


@pytest.mark.parametrize("rule", [General(), away()], ids=["start", "away"])
def test_the_scale_of_the_loss_does_not_matter(rule):
    one = run(rule, draw(SHAPES), noisy, 12)
    other = run(rule, draw(SHAPES), lambda *a: 1e-4 * noisy(*a), 12)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_larger_weights_take_larger_steps():
    small, large = (run(General(), [t.clone()], noisy, 1)[0] - t for t in draw([(64, 64)] * 2))
    assert torch.equal(small.abs() > 0, large.abs() > 0)
    theta = draw([(64, 64)])[0]
    moves = [float((run(General(), [s * theta], noisy, 1)[0] - s * theta).abs().mean()) for s in (0.02, 0.32)]
    assert moves[1] / moves[0] == pytest.approx(4.0, rel=0.05)  # the square root of 16, at the start


def test_a_tensor_without_gradient_stays():
    thetas = draw(SHAPES)
    before = [t.clone() for t in thetas]
    run(away(), thetas, lambda theta, i, step: torch.zeros_like(theta), 5)
    assert all(torch.equal(a, b) for a, b in zip(thetas, before, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_statistics_in_c_are_those_in_torch(dtype, tolerance):
    thetas, grads = draw(SHAPES, dtype=dtype), draw(SHAPES, seed=1, dtype=dtype)
    slots = [tuple(draw([shape] * 3, seed=2 + i, dtype=dtype)) for i, shape in enumerate(SHAPES)]
    plain, compiled = _means(thetas, grads, slots), _means_in_c(thetas, grads, slots)
    torch.testing.assert_close(compiled, plain, rtol=tolerance, atol=tolerance)


def test_it_finds_the_bottom_of_a_bowl_from_any_scale():
    for scale in (1e-3, 1.0, 1e3):
        theta = run(General(), draw([(20, 20)]), lambda theta, i, step, c=scale: c * theta, 300)[0]
        assert theta.square().mean() < 0.01  # from 1


def test_many_steps_of_noise_stay_near_the_bottom():
    (theta,) = run(General(), draw([(8, 8)]), noisy, 2000)
    assert theta.square().mean() < 0.3
