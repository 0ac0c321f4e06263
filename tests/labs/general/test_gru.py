"""The fused GRU: torch's own values and gradients, with and without a compiler."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from dynlm.labs.general.gru import gru


@pytest.mark.parametrize("kernel", ["compiled", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_torch(monkeypatch, kernel, dtype):
    if kernel == "eager":
        monkeypatch.setenv("DYNLM_KERNEL", "eager")
    generator = torch.Generator().manual_seed(0)
    x_SBD = torch.randn(6, 3, 5, generator=generator, dtype=dtype)
    weights_SBD = torch.randn(6, 3, 12, generator=generator, dtype=dtype)
    layer = nn.GRU(5, 12, dtype=dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype))
        layer.bias_hh_l0.zero_()
    adapted = [layer.weight_ih_l0, layer.bias_ih_l0, layer.weight_hh_l0]
    outputs = [layer(x_SBD)[0], gru(F.linear(x_SBD, *adapted[:2]), adapted[2])]
    torch.testing.assert_close(outputs[1], outputs[0])
    ours, theirs = (torch.autograd.grad((output * weights_SBD).sum(), adapted) for output in reversed(outputs))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(3, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    recurrent = torch.randn(6, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert gradcheck(gru, (gates, recurrent))


def test_saturated_gates_stay_finite():
    gates = torch.tensor([-200.0, 200.0]).repeat(2, 3, 3).requires_grad_()
    states = gru(gates, torch.zeros(6, 2))
    assert states.isfinite().all()
    assert torch.autograd.grad(states.sum(), gates)[0].isfinite().all()
