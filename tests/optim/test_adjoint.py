"""The fused adjoint of a step and torch's autograd through ``Rule.step`` agree."""

from dataclasses import replace

import pytest
import torch

from dynlm.compiler import find_compiler
from dynlm.optim.adjoint import FusedAdjoint
from dynlm.optim.base import Clock, Coordinates
from lab import make_lab
from support.rules import READING, make

TRACEABLE = [name for name in READING if make(name, make_lab()[2]).traceable]

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")


@pytest.mark.parametrize("name", TRACEABLE)
@pytest.mark.parametrize("threads", [1, 2])
def test_values_and_every_derivative_agree(name, threads):
    torch.set_num_threads(threads)
    prior = make_lab()[2][0]
    rule, generator = make(name, make_lab()[2]), torch.Generator().manual_seed(0)

    def draw(scale):
        return scale * torch.randn(prior.theta0.shape, generator=generator, dtype=torch.float64)

    theta0 = prior.theta0.clone().requires_grad_()
    theta = (prior.theta0 + draw(0.05)).requires_grad_()
    grad = (prior.mean_rms * draw(2.0)).requires_grad_()
    slots = tuple(draw(0.3).square().requires_grad_() for _ in range(rule.n_slots))
    state = replace(rule.init([prior]), clock=Clock(3, 2.0, 2.5))
    seen, _ = rule.observe([theta.detach()], [grad.detach()], state, [prior])
    directions = [draw(1.0) for _ in range(1 + rule.n_slots)]
    results = []
    w = Coordinates(theta, theta0, prior.rms, grad, seen.rows[0], seen.cols[0])
    for step in (rule.flat_step, FusedAdjoint(rule)):
        context_nN, _ = rule.tensor_step(rule.shared([prior], seen.scalars, [3]), state.tensors)
        new, new_slots = step(w, slots, context_nN[0])
        phi = [p for p in rule.parameters() if p.numel()]
        total = sum((d * x).sum() for d, x in zip(directions, (new, *new_slots), strict=True))
        inputs = [theta, theta0, grad, *slots, *phi]
        derivatives = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
        results.append([new, *new_slots, *derivatives])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-12)
