"""The fast one-stream backward pass against torch's own kernel."""

import pytest
import torch

from dynlm.models.recurrence import differentiable_twice, lstm_layer


def layer(n_steps, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n_steps)
    shapes = [(1, n_steps, 5), (1, 7), (1, 7), (28, 5), (28, 7), (28,)]
    x, h, c, *weights = (torch.randn(*s, generator=generator, dtype=dtype) for s in shapes)
    return [x, *weights], (h, c)


@pytest.mark.parametrize("kernel", ["compiled", "eager"])
@pytest.mark.parametrize("n_steps", [1, 2, 9])
def test_fast_backward_equals_torch(n_steps, kernel, monkeypatch):
    monkeypatch.setenv("DYNLM_KERNEL", kernel)
    inputs, state = layer(n_steps)
    results = []
    for twice in (False, True):
        leaves = [t.clone().requires_grad_() for t in inputs]
        if twice:
            with differentiable_twice():
                output, new_state = lstm_layer(leaves[0], state, *leaves[1:])
        else:
            output, new_state = lstm_layer(leaves[0], state, *leaves[1:])
        (output * torch.arange(1, output.numel() + 1).view_as(output)).sum().backward()
        results.append((output.detach(), *new_state, *[t.grad for t in leaves]))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)


def test_scores_do_not_depend_on_gradients_being_taken():
    inputs, state = layer(6, torch.float32)
    weights = [t.requires_grad_() for t in inputs[1:]]
    with_graph, _ = lstm_layer(inputs[0], state, *weights)
    with torch.no_grad():
        without, _ = lstm_layer(inputs[0], state, *weights)
    assert with_graph.requires_grad
    assert torch.equal(with_graph, without)


def test_second_derivative_is_refused_by_the_fast_path_and_right_in_torchs():
    inputs, state = layer(3)
    leaves = [t.requires_grad_() for t in inputs]
    output, _ = lstm_layer(leaves[0], state, *leaves[1:])
    (gradient,) = torch.autograd.grad(output.square().sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()

    def loss(weight_hh):
        with differentiable_twice():
            output, _ = lstm_layer(leaves[0], state, leaves[1], weight_hh, leaves[3])
        return output.square().sum()

    assert torch.autograd.gradgradcheck(loss, leaves[2])


@pytest.mark.parametrize("width", [256, 1024])
def test_gradients_in_bfloat16_are_those_of_float32_to_its_rounding(width):
    """At 1,024 units torch's own kernel is wrong by a third where the CPU has AMX; elsewhere this holds anyway."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 8, 16), (4 * width, 16), (4 * width, width), (4 * width,)]
    inputs = [torch.randn(*shape, generator=generator) * 0.05 for shape in shapes]
    sent_BTH, found = torch.randn(4, 8, width, generator=generator), []
    for half in (False, True):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output, _ = lstm_layer(leaves[0], (torch.zeros(4, width),) * 2, *leaves[1:])
        (output.float() * sent_BTH).sum().backward()
        found.append([t.grad for t in leaves])
    for full, low in zip(*found, strict=True):
        assert (full - low).norm() < 0.02 * full.norm()
