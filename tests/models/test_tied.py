"""Embedding and read-out with one gradient buffer: the same logits and gradients as two separate uses of the matrix."""

import pytest
import torch
import torch.nn.functional as F

from dynlm.models.lstm import ModelConfig
from dynlm.models.recurrence import differentiable_twice
from dynlm.models.tied import Link, embed, read_out


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def test_gradients_are_those_of_two_uses():
    ids_T, weight, bias, link = torch.tensor([3, 1, 3, 0]), draw(5, 4), draw(5, seed=1), Link()
    plain = F.linear(F.embedding(ids_T, weight).tanh(), weight, bias)
    linked = read_out(embed(ids_T, weight, link).tanh(), weight, bias, link)
    assert torch.equal(plain, linked)
    out = draw(4, 5, seed=2)
    expected = torch.autograd.grad((out * plain).sum(), [weight, bias])
    actual = torch.autograd.grad((out * linked).sum(), [weight, bias])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_a_gradient_of_the_bias_alone():
    ids_T, weight, bias, link = torch.tensor([2, 0]), draw(3, 4), draw(3, seed=1), Link()
    loss = read_out(embed(ids_T, weight, link), weight, bias, link).square().sum()
    (actual,) = torch.autograd.grad(loss, [bias])
    expected = 2 * F.linear(weight[ids_T], weight, bias).sum(0)
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_reads_alike_by_both_ways(tied):
    model = ModelConfig(embedding_size=6, hidden_size=7).build(11, 0, seed=1).double().eval()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.embedding.weight.detach().clone())
    ids = torch.tensor([[1, 5, 5, 2, 9]])
    results = []
    for way in (torch.enable_grad(), differentiable_twice()):
        with way:
            loss = F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:])
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
