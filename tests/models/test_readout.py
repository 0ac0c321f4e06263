"""The fused read-out against its plain form: cross_entropy(linear(h, W, b))."""

import pytest
import torch
import torch.nn.functional as F

from dynlm.models import readout
from dynlm.models.lstm import ModelConfig
from dynlm.types import InputError


def make(rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = ((rows, 6), (11, 6), (11,))
    tensors = [torch.randn(size, generator=generator, dtype=dtype, requires_grad=True) for size in sizes]
    return tensors, torch.randint(11, (rows,), generator=generator)


@pytest.mark.parametrize("rows", [1, 7, 8, 20])
def test_loss_and_gradients_are_those_of_cross_entropy(rows, monkeypatch):
    monkeypatch.setattr(readout, "ROWS", 8)
    (h, weight, bias), targets = make(rows)
    plain = F.cross_entropy(F.linear(h, weight, bias), targets)
    expected = torch.autograd.grad(3 * plain, (h, weight, bias))
    loss = readout.mean_loss(h, weight, bias, targets)
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (h, weight, bias)), expected, rtol=1e-11, atol=1e-15)


def test_large_logits_stay_finite():
    (h, weight, bias), targets = make(4)
    loss = readout.mean_loss(h * 1e3, weight, bias, targets)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(h * 1e3, weight, bias), targets))


def test_in_half_precision_it_is_as_near_as_the_plain_form():
    (h, weight, bias), targets = make(300, torch.float32)
    exact = torch.autograd.grad(F.cross_entropy(F.linear(h, weight, bias), targets), (h, weight, bias))

    def off(loss):
        found = torch.autograd.grad(loss, (h, weight, bias))
        return torch.tensor([(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)])

    with torch.autocast("cpu", torch.bfloat16):
        plain = F.cross_entropy(F.linear(h, weight, bias).float(), targets)
        fused = readout.mean_loss(h, weight, bias, targets)
    assert fused.dtype == torch.float32
    assert (off(fused) <= off(plain) + 2e-3).all()


@pytest.mark.parametrize("projection", [False, True])
def test_a_model_with_targets_gives_the_loss_without_logits(projection):
    config = ModelConfig(embedding_size=8, hidden_size=12, projection=projection, activation_regularization=2.0)
    model = config.build(20, 0, 0).double().train()
    ids = torch.randint(20, (3, 9), generator=torch.Generator().manual_seed(0))
    plain = model(ids[:, :-1])
    nats = F.cross_entropy(plain.logits.flatten(0, 1), ids[:, 1:].flatten())
    expected = torch.autograd.grad(nats + plain.penalty, list(model.parameters()))
    output = model(ids[:, :-1], targets=ids[:, 1:])
    assert output.logits is None
    with pytest.raises(InputError, match="give labels, -100 where padded, or targets alone"):
        model(ids[:, :-1], targets=ids[:, 1:], labels=ids[:, :-1])
    torch.testing.assert_close(output.loss, nats + plain.penalty)
    torch.testing.assert_close(torch.autograd.grad(output.loss, list(model.parameters())), expected)
