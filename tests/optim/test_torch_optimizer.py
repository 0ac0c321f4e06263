"""The contract of a torch optimizer, for every rule: its steps and its options."""

import copy
import math

import pytest
import torch
from torch import nn

from dynlm.optim import LearnedOptimizer
from dynlm.optim.base import Clock, Prior
from dynlm.optim.general import General
from dynlm.optim.handmade import SGD, Adam
from dynlm.types import InputError
from lab import needs_compiler
from support.optimizers import (
    SEE_SURPRISE,
    as_matrix,
    assert_same_state,
    for_rules,
    give,
    gradients,
    make_parameters,
    moved,
    run,
    same,
    trained,
)

pytestmark = pytest.mark.usefixtures("eager")


class Reference:
    """The functional update, with the running RMS written out."""

    def __init__(self, name, scales=None):
        self.rule, self.state, self.clock = moved(name), None, Clock()
        self.theta0 = [as_matrix(p.detach().clone()) for p in make_parameters()]
        self.thetas = [t.clone() for t in self.theta0]
        self.squares = [torch.zeros_like(t) for t in self.thetas]
        self.scales = scales or [(1.0, 1.0)] * len(self.thetas)

    @torch.no_grad()
    def step(self, step):
        grads = [as_matrix(g) for g in gradients(step)]
        self.clock.tick(3.0 + step % 3)
        self.squares = [0.999 * s + 0.001 * g * g for s, g in zip(self.squares, grads, strict=True)]
        rms = [(s / (1 - 0.999**self.clock.step)).sqrt() for s in self.squares]
        relative = len(rms) / sum(float(r.mean()) for r in rms)
        priors = [Prior("", t, r, float(r.mean()), relative) for t, r in zip(self.theta0, rms, strict=True)]
        self.state = self.state or self.rule.init(priors)
        self.state.clock = self.clock
        new, self.state = self.rule.update(self.thetas, grads, self.state, priors)
        rows = zip(self.thetas, new, self.scales, strict=True)
        self.thetas = [keep * old + lr * (theta - old) for old, theta, (lr, keep) in rows]


@for_rules
@pytest.mark.parametrize("kernel", ["eager", pytest.param("compiled", marks=needs_compiler)])
def test_steps_equal_the_functional_update(name, kernel, monkeypatch):
    if kernel == "compiled":
        monkeypatch.delenv("DYNLM_KERNEL")
    reference, parameters = Reference(name, [(0.7, 1 - 0.7 * 0.03)] * 4), make_parameters()
    unit = moved(name).reference_lr
    optimizer = LearnedOptimizer(parameters, moved(name), lr=0.7 * unit, weight_decay=0.03 / unit)
    for step in range(6):
        run(optimizer, parameters, [step])
        reference.step(step)
        same([as_matrix(p) for p in parameters], reference.thetas, 1e-12)
    for p, slots in zip(parameters, reference.state.slots, strict=True):
        for k, slot in enumerate(slots):
            torch.testing.assert_close(optimizer.state[p][f"slot{k}"].view_as(slot), slot, rtol=1e-11, atol=1e-12)


@for_rules
@pytest.mark.parametrize("kernel", ["eager", pytest.param("compiled", marks=needs_compiler)])
def test_groups_have_their_own_rate_and_decay_and_are_seen_together(name, kernel, monkeypatch):
    if kernel == "compiled":
        monkeypatch.delenv("DYNLM_KERNEL")
    a, b, c, d = parameters = make_parameters()
    unit = moved(name).reference_lr
    groups = [{"params": [a, b], "lr": 0.5 * unit}, {"params": [c], "weight_decay": 0.1 / unit}]
    groups.append({"params": [d], "lr": 0.0})
    optimizer = LearnedOptimizer(groups, moved(name), lr=0.8 * unit)
    reference = Reference(name, [(0.5, 1.0), (0.5, 1.0), (0.8, 1 - 0.8 * 0.1), (0.0, 1.0)])
    for step in range(4):
        run(optimizer, parameters, [step])
        reference.step(step)
    same([as_matrix(p) for p in parameters], reference.thetas, 1e-12)
    assert torch.equal(d, make_parameters()[3])


@for_rules
def test_the_loss_of_a_closure_reaches_the_rule(name):
    with_loss, without = make_parameters(), make_parameters()
    run(LearnedOptimizer(with_loss, moved(name)), with_loss, range(4))
    run(LearnedOptimizer(without, moved(name)), without, range(4), losses=False)
    equal = all(torch.equal(a, b) for a, b in zip(with_loss, without, strict=True))
    assert equal == (name not in SEE_SURPRISE)


@for_rules
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_one_clear_line_and_changes_nothing(name, bad):
    optimizer, parameters = trained(name, 2)
    before = [p.detach().clone() for p in parameters]
    state = copy.deepcopy(optimizer.state_dict())
    give(parameters, 2)
    parameters[0].grad[3, 1] = bad
    with pytest.raises(InputError, match=r"gradient of a parameter of shape \(7, 3\) is not finite: skip this step"):
        optimizer.step()
    same(parameters, before)
    assert_same_state(optimizer.state_dict(), state)
    run(optimizer, parameters, [2])
    assert all(torch.isfinite(p).all() for p in parameters)


@for_rules
def test_two_runs_are_bitwise_the_same(name):
    same(trained(name, 5)[1], trained(name, 5)[1])


@for_rules
def test_layouts_of_memory_do_not_matter(name):
    parameters, plain = make_parameters(torch.float32), make_parameters(torch.float32)
    last = nn.Parameter(parameters[1].detach().to(memory_format=torch.channels_last))
    turned = nn.Parameter(parameters[0].detach().t().contiguous().t())
    assert not last.is_contiguous()
    assert not turned.is_contiguous()
    parameters[:2] = [turned, last]
    run(LearnedOptimizer(parameters, moved(name)), parameters, range(3))
    run(LearnedOptimizer(plain, moved(name)), plain, range(3))
    same(parameters, plain)


@for_rules
def test_sparse_gradients_are_taken_as_dense(name):
    sparse, dense = [nn.Embedding(6, 3, sparse=s, dtype=torch.float64) for s in (True, False)]
    dense.load_state_dict(sparse.state_dict())
    for table in (sparse, dense):
        optimizer = LearnedOptimizer(table.parameters(), moved(name))
        for ids in ([1, 1, 4], [0, 4, 4]):
            optimizer.zero_grad()
            table(torch.tensor(ids)).square().sum().backward()
            optimizer.step()
    assert sparse.weight.grad.is_sparse
    same([sparse.weight], [dense.weight])


@for_rules
def test_maximize_is_the_negative_gradient(name):
    up, down = make_parameters(), make_parameters()
    climb = LearnedOptimizer(up, moved(name), maximize=True)
    descend = LearnedOptimizer(down, moved(name))
    for step in range(3):
        give(up, step)
        for p, q in zip(up, down, strict=True):
            q.grad = -p.grad
        climb.step()
        descend.step()
    same(up, down)


@for_rules
def test_clipping_is_torchs_and_leaves_gradients(name):
    ours, theirs = make_parameters(), make_parameters()
    clip = LearnedOptimizer(ours, moved(name), max_grad_norm=0.2)
    plain = LearnedOptimizer(theirs, moved(name))
    for step in range(4):
        size = 1e-3 if step == 2 else 0.1  # nothing to clip there
        give(ours, step, size)
        give(theirs, step, size)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.2)
        assert (norm > 0.2) == (step != 2)
        clip.step()
        plain.step()
        same([p.grad for p in ours], gradients(step, size))
    same(ours, theirs, 1e-12)


@for_rules
def test_gradients_of_zero_are_no_trouble(name):
    """As a low-rank adapter's first factor has, while its second one is zero."""
    parameters = make_parameters(torch.float32)
    optimizer = LearnedOptimizer(parameters, moved(name))
    for step in range(5):
        give(parameters, step)
        if step < 2:
            parameters[0].grad.zero_()
            parameters[1].grad[0].zero_()
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in parameters)


@needs_compiler
@for_rules
def test_an_old_graph_notices_the_step(name, monkeypatch):
    monkeypatch.delenv("DYNLM_KERNEL")  # what C writes, torch does not see by itself
    p = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    optimizer = LearnedOptimizer([p], moved(name))
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@for_rules
def test_no_weight_decay_and_rate_zero_move_nothing(name):
    parameters = make_parameters()
    run(LearnedOptimizer(parameters, moved(name), lr=0.0, weight_decay=0.5), parameters, range(3))
    same(parameters, make_parameters())


@for_rules
def test_scaled_gradients_with_an_overflow_skip_one_step(name):
    parameters = make_parameters(torch.float32)
    optimizer, plain = LearnedOptimizer(parameters, moved(name)), make_parameters(torch.float32)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0)
    for step in range(3):
        optimizer.zero_grad()
        rows = zip(parameters, gradients(step), strict=True)
        scaler.scale(sum((p * g.float()).sum() for p, g in rows)).backward()
        if step == 1:
            parameters[2].grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    other = LearnedOptimizer(plain, moved(name))
    for step in (0, 2):
        give(plain, step)
        other.step()
    assert optimizer.state[parameters[0]]["step"] == 2
    same(parameters, plain, 1e-5)


def against_torch(ours, theirs, skip=()):
    a, b = make_parameters(), make_parameters()
    ours, theirs = ours(a), theirs(b)
    for step in range(12):
        for parameters in (a, b):
            give(parameters, step)
            if step in skip:
                parameters[0].grad = None
        ours.step()
        theirs.step()
        same(a, b, 1e-12)


@pytest.mark.parametrize("skip", [(), (0, 3, 4)])
@pytest.mark.parametrize("lr", [0.1, 0.003])
def test_sgd_is_torchs(lr, skip):
    against_torch(lambda p: LearnedOptimizer(p, SGD(lr)), lambda p: torch.optim.SGD(p, lr), skip)
    against_torch(lambda p: LearnedOptimizer(p, SGD(1.0), lr=lr), lambda p: torch.optim.SGD(p, lr), skip)


@pytest.mark.parametrize("skip", [(), (0, 3, 4)])
@pytest.mark.parametrize("lr", [0.1, 0.003])
def test_adam_is_torchs(lr, skip):
    against_torch(lambda p: LearnedOptimizer(p, Adam(lr)), lambda p: torch.optim.Adam(p, lr), skip)


@pytest.mark.parametrize("decay", [0.01, 0.3])
def test_adam_with_weight_decay_is_torchs_adamw(decay):
    against_torch(
        lambda p: LearnedOptimizer(p, Adam(1.0), lr=0.02, weight_decay=decay),
        lambda p: torch.optim.AdamW(p, 0.02, weight_decay=decay),
    )


def test_a_tensor_for_lr_is_taken():
    parameters, plain = make_parameters(), make_parameters()
    optimizer = LearnedOptimizer(parameters, SGD(1.0), lr=torch.tensor(0.25))
    run(optimizer, parameters, range(2))
    optimizer.param_groups[0]["lr"].fill_(0.0)
    run(optimizer, parameters, [2])
    run(LearnedOptimizer(plain, SGD(1.0), lr=0.25), plain, range(2))
    same(parameters, plain)


def test_the_closure_sees_gradients_and_its_loss_comes_back():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = LearnedOptimizer([p], SGD(0.1))

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert float(loss.detach()) == 9.0
    assert float(p.detach()) == pytest.approx(3.0 - 0.1 * 6.0)
    assert optimizer.step() is None
    assert optimizer.step(lambda: None) is None


def test_without_any_gradient_nothing_happens():
    parameters = make_parameters()
    optimizer = LearnedOptimizer(parameters, "adam", max_grad_norm=1.0)
    assert optimizer.step(lambda: 2.5) == 2.5
    same(parameters, make_parameters())
    assert not optimizer.state
    assert optimizer.state_dict()["state"] == {}


def test_zero_grad_sets_to_none_or_zero():
    optimizer, parameters = trained("adam", 1)
    optimizer.zero_grad(set_to_none=False)
    assert all(float(p.grad.abs().max()) == 0 for p in parameters)
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)


def test_parameters_without_elements_are_left_out():
    empty, full = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.ones(2))
    empty.grad, full.grad = torch.empty(0, 4), torch.ones(2)
    LearnedOptimizer([empty, full], SGD(0.5)).step()
    assert torch.equal(full, torch.full((2,), 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1: give a finite number"),
        ({"lr": math.nan}, "lr is nan"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0: give a norm above 0"),
        ({"state_dtype": torch.float16}, r"state_dtype is torch.float16: choose torch.float32 or torch.bfloat16"),
    ],
)
def test_bad_settings_are_one_clear_line(options, message):
    with pytest.raises(InputError, match=message) as error:
        LearnedOptimizer(make_parameters(), "sgd", **options)
    assert "\n" not in str(error.value)


def test_bad_parameters_and_groups_are_refused():
    with pytest.raises(InputError, match=r"is complex: optimize torch.view_as_real"):
        LearnedOptimizer([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], "sgd")
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        LearnedOptimizer(make_parameters(), "sgd", momentum=0.9)
    with pytest.raises(ValueError, match="empty parameter list"):
        LearnedOptimizer([], "sgd")
    optimizer = LearnedOptimizer(make_parameters(), "sgd")
    with pytest.raises(InputError, match="a group asks for the rule 'adam'"):
        optimizer.add_param_group({"params": make_parameters(), "rule": "adam"})
    with pytest.raises(InputError, match="lr is -1"):
        optimizer.add_param_group({"params": make_parameters(), "lr": -1})
    assert len(optimizer.param_groups) == 1


def test_options_of_torchs_optimizers_are_taken_without_effect():
    parameters, plain = make_parameters(), make_parameters()
    run(LearnedOptimizer(parameters, "adam", foreach=True, capturable=True), parameters, range(3))
    run(LearnedOptimizer(plain, "adam"), plain, range(3))
    same(parameters, plain)


def test_a_small_network_learns_with_adam_and_general():
    for rule in (Adam(0.01), General()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        x = torch.randn(64, 6)
        y = x[:, :1] * x[:, 1:2]
        optimizer = LearnedOptimizer(model.named_parameters(), rule)
        losses = []
        for _ in range(80):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.5 * losses[0]
