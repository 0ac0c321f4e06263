"""The recurrent cells' C update against their plain step."""

import math

import pytest
import torch

from dynlm.compiler import find_compiler
from dynlm.optim.base import Coordinates
from dynlm.optim.features import N_COL, N_ROW
from dynlm.optim.kernel import arrays_of
from dynlm.optim.recurrent import GRUCell, LSTMCell, RecurrentConfig
from dynlm.optim.recurrent_kernel import recurrent_kernel

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")

CELLS = {"lstm": LSTMCell, "gru": GRUCell}
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5)]
SHAPES = [(17, 5), (1, 41), (2, 2), (1, 1)]  # several blocks and a part of one, a vector, less than a block or tile


def moved_rule(kind, dtype, hidden, layers, spread=0.3):
    """A cell away from its start: every meta-parameter counts, the read-out too."""
    rule = CELLS[kind](RecurrentConfig(hidden=hidden, layers=layers))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return rule.to(dtype)


def inputs_of(rule, shape, dtype, step):
    """(coordinates at θ0, context) of one update, as the rule's step takes them."""
    generator = torch.Generator().manual_seed(0)
    theta0 = torch.randn(shape, generator=generator, dtype=dtype)
    rms = torch.rand(shape, generator=generator, dtype=dtype) * 1e-2
    rms[0, :3] = 0.0 if rms.numel() > 3 else 5e-3  # weights that never saw a gradient
    numbers = torch.tensor([0.05, 1e-3, 150.0, 0.3, rms.mean()], dtype=dtype)  # a decay that is clipped for some
    layers = zip(rule.input_weights, rule.hidden_weights, rule.biases, strict=True)
    context = (*(t for three in layers for t in three), rule.output_weight, numbers)
    generator.manual_seed(100 + step)
    grad = torch.randn(shape, generator=generator, dtype=dtype) * 1e-2
    grad *= torch.rand(shape, generator=generator) > 0.2  # some exact zeros
    row = tuple(torch.rand(shape[0], 1, generator=generator, dtype=dtype) - 0.5 for _ in range(N_ROW))
    col = tuple(torch.rand(1, shape[1], generator=generator, dtype=dtype) - 0.5 for _ in range(N_COL))
    return Coordinates(theta0.clone(), theta0, rms, grad, row, col), context


def compiled_step(kind, hidden, layers, threads):
    kernel = recurrent_kernel(kind, hidden, layers, N_ROW, N_COL)

    def step(w, slots, context):
        flat = torch.cat([t.reshape(-1) for t in context])
        kernel({"threads": threads, "context": flat, **arrays_of(w, slots)})
        return w.theta, slots

    return step


def no_slots(rule, shape, dtype):
    return tuple(torch.zeros(*shape, rule.slot_width, dtype=dtype) for _ in range(rule.n_slots))


@torch.no_grad()
def run(step, rule, shape, dtype, n_steps):
    """θ − θ0 and the slots after some updates."""
    theta, slots = None, no_slots(rule, shape, dtype)
    for t in range(n_steps):
        w, context = inputs_of(rule, shape, dtype, t)
        theta, slots = step(w if theta is None else w._replace(theta=theta), slots, context)
    return [theta - w.theta0, *slots]


def assert_same(got, wanted, tolerance):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(("hidden", "layers"), [(20, 2), (20, 1), (7, 2), (33, 1)])
@pytest.mark.parametrize("kind", list(CELLS))
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_compiled_step_equals_the_plain_one(kind, hidden, layers, dtype, tolerance):
    rule = moved_rule(kind, dtype, hidden, layers)
    compiled = compiled_step(kind, hidden, layers, 2)
    for shape in SHAPES:
        plain = run(rule.step, rule, shape, dtype, 5)
        assert_same(run(compiled, rule, shape, dtype, 5), plain, tolerance)
        assert plain[0].abs().max() > 1e-3  # the weights moved by far more than the tolerance


@pytest.mark.parametrize("kind", list(CELLS))
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_gates_shut_and_open_alike(kind, dtype, tolerance):
    """Meta-parameters so large that exponents leave the range in which they are computed."""
    rule = moved_rule(kind, dtype, 7, 2, spread=200.0)
    with torch.no_grad():
        rule.output_weight.normal_(generator=torch.Generator().manual_seed(3))
    plain = run(rule.step, rule, (17, 5), dtype, 1)
    assert torch.isfinite(plain[0]).all()
    assert_same(run(compiled_step(kind, 7, 2, 1), rule, (17, 5), dtype, 1), plain, 10 * tolerance)


@pytest.mark.parametrize("kind", list(CELLS))
def test_threads_do_not_change_a_bit(kind):
    rule, dtype = moved_rule(kind, torch.float32, 20, 2), torch.float32
    one, two = (run(compiled_step(kind, 20, 2, n), rule, (17, 15), dtype, 3) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", list(CELLS))
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_no_number_stays_visible(kind, dtype, tolerance, bad):
    rule = moved_rule(kind, dtype, 7, 2)
    w, context = inputs_of(rule, (17, 5), dtype, 0)
    w.grad[2, 2] = bad
    slots = no_slots(rule, (17, 5), dtype)
    with torch.no_grad():
        plain, plain_slots = rule.step(w, slots, context)
        theta, slots = compiled_step(kind, 7, 2, 2)(w, slots, context)
    assert_same([theta, *slots], [plain, *plain_slots], tolerance)
    assert not theta[2, 2].isfinite()
    assert torch.isfinite(theta).sum() == theta.numel() - 1
    if math.isnan(bad):
        assert all(slot[2, 2].isnan().all() for slot in slots)
