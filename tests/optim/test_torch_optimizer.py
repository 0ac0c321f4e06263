"""The contract of a torch optimizer, for every rule; rules to share."""

import copy
import io
import math
import pickle
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from torch import nn

import dynlm.optim
from dynlm.optim import LearnedOptimizer, hub
from dynlm.optim.base import Clock, Prior, Rule
from dynlm.optim.gated import Gated, GatedConfig
from dynlm.optim.general import General
from dynlm.optim.handmade import SGD, Adam
from dynlm.optim.library import make_rule
from dynlm.types import InputError

SETTINGS = {
    "sgd": {"lr": 0.05, "decay": 0.01},
    "rms": {"lr": 0.01, "eps": 1e-3, "decay": 0.01},
    "adam": {"lr": 0.01, "decay": 0.01},
    "linear": {"weight": -0.05, "bias": -0.01},
    "gated": {"lr": 0.01},
    "diagonal": {"lr": 0.01},
    "mlp": {"lr": 0.01},
    "lstm": {"lr": 0.01, "hidden": 3},
    "gru": {"lr": 0.01, "hidden": 3},
    "general": {},
}
RULES = list(SETTINGS)
SLOTTED = [name for name in RULES if name not in ("sgd", "rms", "linear")]
SEE_SURPRISE = ["gated", "diagonal", "mlp", "lstm", "gru"]
SHAPES = {"table": (7, 3), "kernel": (2, 3, 2, 2), "bias": (5,), "scale": ()}
NAN = math.nan
needs_compiler = pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="no C compiler")
for_rules = pytest.mark.parametrize("name", RULES)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Most tests need no C: what is compiled equals what is not, and one test here says so."""
    monkeypatch.setenv("DYNLM_KERNEL", "eager")


def moved(name):
    """A rule whose networks do something: away from the start."""
    rule = make_rule(name, **SETTINGS[name])
    if name not in ("sgd", "rms", "adam", "linear"):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in rule.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return rule


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


def as_matrix(t):
    return t.reshape(t.shape[0], -1) if t.dim() > 1 else t.reshape(1, -1)


@for_rules
@pytest.mark.parametrize("kernel", ["eager", pytest.param("compiled", marks=needs_compiler)])
def test_steps_equal_the_functional_update(name, kernel, monkeypatch):
    if kernel == "compiled":
        monkeypatch.delenv("DYNLM_KERNEL")
    reference, parameters = Reference(name, [(0.7, 1 - 0.7 * 0.03)] * 4), make_parameters()
    optimizer = LearnedOptimizer(parameters, moved(name), lr=0.7, weight_decay=0.03)
    for step in range(6):
        run(optimizer, parameters, [step])
        reference.step(step)
        same([as_matrix(p) for p in parameters], reference.thetas, 1e-12)
    for p, slots in zip(parameters, reference.state.slots, strict=True):
        for k, slot in enumerate(slots):
            torch.testing.assert_close(optimizer.state[p][f"slot{k}"].view_as(slot), slot, rtol=1e-11, atol=1e-12)


@for_rules
def test_groups_have_their_own_rate_and_decay_and_are_seen_together(name):
    a, b, c, d = parameters = make_parameters()
    groups = [{"params": [a, b], "lr": 0.5}, {"params": [c], "weight_decay": 0.1}, {"params": [d], "lr": 0.0}]
    optimizer = LearnedOptimizer(groups, moved(name), lr=0.8)
    reference = Reference(name, [(0.5, 1.0), (0.5, 1.0), (0.8, 1 - 0.8 * 0.1), (0.0, 1.0)])
    for step in range(4):
        run(optimizer, parameters, [step])
        reference.step(step)
    same([as_matrix(p) for p in parameters], reference.thetas, 1e-12)
    assert torch.equal(d, make_parameters()[3])


@for_rules
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name):
    _, whole = trained(name, 7)
    first, parameters = trained(name, 3)
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "weights": list(parameters)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = [nn.Parameter(p.detach()) for p in saved["weights"]]
    optimizer = LearnedOptimizer(again, moved(name))
    optimizer.load_state_dict(saved["optimizer"])
    assert_same_state(optimizer.state_dict(), first.state_dict())
    run(optimizer, again, range(3, 7))
    same(again, whole)


@for_rules
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(name, how):
    optimizer, parameters = trained(name, 3)
    frozen = [p.detach().clone() for p in parameters]
    pair = (optimizer, parameters)
    other, others = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    run(other, others, range(3, 6))
    same(parameters, frozen)
    run(optimizer, parameters, range(3, 6))
    same(others, parameters)


@for_rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_updated_in_float32_and_rounded(name, dtype):
    halves = make_parameters(dtype)
    whole = [nn.Parameter(p.detach().float()) for p in halves]
    optimizers = [LearnedOptimizer(parameters, moved(name)) for parameters in (halves, whole)]
    for step in range(3):
        with torch.no_grad():
            for p, half in zip(whole, halves, strict=True):
                p.copy_(half)  # the rounded weight is where both start from
        for p, half, grad in zip(whole, halves, gradients(step), strict=True):
            half.grad = grad.to(dtype)
            p.grad = half.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        same(halves, [p.to(dtype) for p in whole])
    state = optimizers[0].state[halves[0]]
    assert {v.dtype for v in state.values() if isinstance(v, torch.Tensor)} <= {torch.float32}
    saved = copy.deepcopy(optimizers[0].state_dict())
    optimizers[0].load_state_dict(saved)  # torch's own would round the state to the weights' dtype
    assert_same_state(optimizers[0].state_dict(), saved)


@for_rules
def test_a_parameter_without_a_gradient_rests(name):
    optimizer, parameters = trained(name, 2)
    give(parameters, 2)
    parameters[1].grad = None
    before, state = parameters[1].detach().clone(), copy.deepcopy(optimizer.state[parameters[1]])
    optimizer.step()
    assert torch.equal(parameters[1], before)
    assert [optimizer.state[p]["step"] for p in parameters] == [3, 2, 3, 3]
    for key, value in optimizer.state[parameters[1]].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[key]))
    run(optimizer, parameters, [3])
    assert all(torch.isfinite(p).all() for p in parameters)
    assert not torch.equal(parameters[1], before)


@for_rules
def test_the_loss_of_a_closure_reaches_the_rule(name):
    with_loss, without = make_parameters(), make_parameters()
    run(LearnedOptimizer(with_loss, moved(name)), with_loss, range(4))
    run(LearnedOptimizer(without, moved(name)), without, range(4), losses=False)
    equal = all(torch.equal(a, b) for a, b in zip(with_loss, without, strict=True))
    assert equal == (name not in SEE_SURPRISE)


@for_rules
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_show(name, bad):
    optimizer, parameters = trained(name, 2)
    give(parameters, 2)
    parameters[0].grad[3, 1] = bad
    optimizer.step()
    assert not torch.isfinite(parameters[0][3, 1])
    clean = LearnedOptimizer(fresh := make_parameters(), moved(name))
    run(clean, fresh, range(3))
    assert torch.isfinite(fresh[0]).all()


@for_rules
def test_the_state_of_another_rule_is_refused(name):
    optimizer, _ = trained(name, 2)
    others = make_parameters()
    other = LearnedOptimizer(others, SGD(0.123))
    before = other.state_dict()
    with pytest.raises(InputError, match=rf"state is of {name}-\w+, not of sgd-\w+: load") as error:
        other.load_state_dict(optimizer.state_dict())
    assert "\n" not in str(error.value)
    assert_same_state(other.state_dict(), before)
    changed = moved(name)
    with torch.no_grad():
        next(changed.parameters()).add_(1e-3)
    with pytest.raises(InputError, match=f"not of {name}"):
        LearnedOptimizer(make_parameters(), changed).load_state_dict(optimizer.state_dict())


@for_rules
def test_the_state_of_other_parameters_is_refused_and_changes_nothing(name):
    optimizer, _ = trained(name, 2)
    state = optimizer.state_dict()
    parameters = make_parameters()[::-1]
    other = LearnedOptimizer(parameters, moved(name))
    if optimizer.rule.n_slots or optimizer.rule.uses_prior:
        with pytest.raises(InputError, match="give the same parameters in the same order"):
            other.load_state_dict(state)
    assert not other.state
    with pytest.raises(ValueError, match="doesn't match the size"):
        LearnedOptimizer(make_parameters()[:2], moved(name)).load_state_dict(state)


@pytest.mark.parametrize("name", SLOTTED)
def test_slots_may_be_bfloat16(name):
    half, parameters = trained(name, 5, torch.float32, state_dtype=torch.bfloat16)
    whole, wholes = trained(name, 5, torch.float32)
    dtypes = {key: v.dtype for key, v in half.state[parameters[0]].items() if isinstance(v, torch.Tensor)}
    assert all((dtype == torch.bfloat16) == key.startswith("slot") for key, dtype in dtypes.items())
    assert "slot0" in dtypes
    apart = max(float((a - b).detach().abs().max()) for a, b in zip(parameters, wholes, strict=True))
    assert 0 < apart < 0.05
    half.load_state_dict(whole.state_dict())
    assert half.state[parameters[0]]["slot0"].dtype == torch.bfloat16


@needs_compiler
@pytest.mark.parametrize("name", ["adam", "general"])
def test_bfloat16_slots_are_the_same_compiled(name, monkeypatch):
    _, parameters = trained(name, 4, torch.float32, state_dtype=torch.bfloat16)
    monkeypatch.delenv("DYNLM_KERNEL")
    _, others = trained(name, 4, torch.float32, state_dtype=torch.bfloat16)
    same(parameters, others, 1e-4)


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
def test_the_given_rule_is_copied_and_not_trained(name):
    rule = moved(name)
    before = copy.deepcopy(rule.state_dict())
    parameters = make_parameters()
    optimizer = LearnedOptimizer(parameters, rule)
    assert all(p.requires_grad for p in rule.parameters())
    assert not any(p.requires_grad for p in optimizer.rule.parameters())
    run(optimizer, parameters, range(2))
    assert all(torch.equal(v, before[k]) for k, v in rule.state_dict().items())
    assert all(p.is_leaf and p.requires_grad for p in parameters)
    with torch.no_grad():
        next(rule.parameters()).add_(1.0)
    run(optimizer, parameters, range(2, 4))
    same(parameters, trained(name, 4)[1])


@for_rules
def test_memory_is_split_and_joined_without_loss(name):
    rule = moved(name)
    optimizer, _ = trained(name, 3)
    kind = optimizer._memory_kind
    parts = [tuple(s[k] for k in s if k.startswith("memory")) for s in optimizer.state.values()]
    memory = rule.join_memory(parts, kind)
    assert type(memory) is type(kind)
    back = rule.split_memory(memory, len(parts))
    assert len(back) == len(parts)
    assert all(torch.equal(a, b) for x, y in zip(parts, back, strict=True) for a, b in zip(x, y, strict=True))
    assert bool(parts[0]) == (name in SEE_SURPRISE or name == "general")


@for_rules
def test_a_new_group_starts_at_its_own_age(name):
    first, *rest = parameters = make_parameters()
    optimizer = LearnedOptimizer([first], moved(name))
    give(parameters, 0)
    optimizer.step()
    optimizer.add_param_group({"params": rest, "lr": 0.5, "weight_decay": 0.1})
    run(optimizer, parameters, [1, 2])
    assert [optimizer.state[p]["step"] for p in parameters] == [3, 2, 2, 2]
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 0.5]
    assert all(torch.isfinite(p).all() for p in parameters)
    assert not any(torch.equal(p, q) for p, q in zip(parameters, make_parameters(), strict=True))


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


def test_a_pickled_optimizer_keeps_its_options_before_the_first_step():
    parameters = make_parameters(torch.float32)
    optimizer = LearnedOptimizer(parameters, "adam", state_dtype=torch.bfloat16, max_grad_norm=0.5, lr=0.3)
    other, others = pickle.loads(pickle.dumps((optimizer, parameters)))
    for one, its in ((optimizer, parameters), (other, others)):
        run(one, its, range(2))
    same(parameters, others)
    assert other.state[others[0]]["slot0"].dtype == torch.bfloat16


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


def test_the_baseline_of_the_loss_is_kept_and_starts_anew_after_a_loss_that_is_not_finite():
    parameters = make_parameters()
    optimizer, clock = LearnedOptimizer(parameters, SGD(0.1)), Clock()
    for loss in (3.0, 2.0, 4.0):
        optimizer.step(lambda loss=loss: loss)
        clock.tick(loss)
        assert {(g["loss"], g["baseline"]) for g in optimizer.param_groups} == {(clock.loss, clock.baseline)}
    for loss in (math.nan, 2.0, 5.0):
        optimizer.step(lambda loss=loss: loss)
    assert optimizer.param_groups[0]["baseline"] == 5.0


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


def test_loading_copies_and_runs_the_hooks_of_others():
    optimizer, parameters = trained("adam", 2)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    others = [nn.Parameter(p.detach().clone()) for p in parameters]
    other = LearnedOptimizer(others, moved("adam"))
    seen = []

    def double(_, incoming):
        first, *_ = incoming["state"].values()
        return {**incoming, "state": {**incoming["state"], 0: {**first, "slot0": 2 * first["slot0"]}}}

    other.register_load_state_dict_pre_hook(double)
    other.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    other.load_state_dict(state)
    assert seen == [4]
    assert torch.equal(other.state[others[0]]["slot0"], 2 * kept["state"][0]["slot0"])
    run(other, others, [2])
    assert_same_state(state, kept)  # the loaded state is another's own
    other.load_state_dict(state)
    assert seen == [4, 4]


def test_the_state_of_torchs_adam_is_refused():
    parameters = make_parameters()
    theirs = torch.optim.Adam(parameters)
    with pytest.raises(InputError, match="this state is of another optimizer, not of adam"):
        LearnedOptimizer(parameters, "adam").load_state_dict(theirs.state_dict())


def test_running_rms_is_the_bias_corrected_mean_square():
    optimizer, parameters = trained("rms", 5)
    for i, p in enumerate(parameters):
        square = sum(0.001 * 0.999 ** (4 - step) * gradients(step)[i] ** 2 for step in range(5))
        torch.testing.assert_close(optimizer.state[p]["rms"], (square / (1 - 0.999**5)).sqrt(), rtol=1e-12, atol=0)
        torch.testing.assert_close(optimizer.state[p]["theta0"], make_parameters()[i].detach(), rtol=0, atol=0)


def test_a_rule_without_prior_keeps_none():
    optimizer, parameters = trained("general", 2)
    assert set(optimizer.state[parameters[0]]) == {"step", "slot0", "slot1", "slot2", "memory0"}


def named_parameters(prefix=""):
    return [(prefix + name, p) for name, p in zip(SHAPES, make_parameters(), strict=True)]


def rms_matrices():
    return {name: as_matrix(g.abs() + 0.01) for name, g in zip(SHAPES, gradients(50), strict=True)}


@pytest.mark.parametrize("name", ["rms", "gated", "lstm"])
def test_priors_by_name_parameter_or_as_measured(name):
    rms = rms_matrices()
    relative = len(rms) / sum(float(r.mean()) for r in rms.values())
    measured = [Prior(key, r, r, float(r.mean()), relative) for key, r in rms.items()]
    results = []
    for kind in ("name", "parameter", "measured", "ddp and compile"):
        pairs = named_parameters("module._orig_mod." if kind == "ddp and compile" else "")
        parameters = [p for _, p in pairs]
        by_parameter = dict(zip(parameters, rms.values(), strict=True))
        priors = {"name": rms, "parameter": by_parameter}.get(kind, measured)
        optimizer = LearnedOptimizer(pairs if kind != "parameter" else parameters, moved(name), priors=priors)
        results.append(run(optimizer, parameters, range(3)))
        assert torch.equal(as_matrix(optimizer.state[parameters[0]]["rms"]), rms["table"])
    for other in results[1:]:
        same(other, results[0], 1e-13)
    assert not torch.equal(results[0][0], trained(name, 3)[1][0])


def test_priors_that_do_not_fit_are_one_clear_line():
    rms = rms_matrices()
    with pytest.raises(
        InputError, match=r"no prior for a parameter of shape \(7, 3\) without a name: key by parameter"
    ):
        LearnedOptimizer(make_parameters(), "rms", priors=rms)
    with pytest.raises(InputError, match="no prior for parameter 'bias'"):
        LearnedOptimizer(named_parameters(), "rms", priors={k: v for k, v in rms.items() if k != "bias"})
    with pytest.raises(InputError, match=r"prior of parameter 'table' is \(2,\), not \(7, 3\)"):
        LearnedOptimizer(named_parameters(), "rms", priors=rms | {"table": torch.ones(2)})


def test_named_parameters_find_their_embedding():
    rule = Gated(GatedConfig(lr=0.01, tensors=("table",)))
    with torch.no_grad():
        rule.output_tensors += 0.5
    unnamed, pairs = make_parameters(), named_parameters()
    named = [p for _, p in pairs]
    run(LearnedOptimizer(unnamed, rule), unnamed, range(2))
    optimizer = LearnedOptimizer(pairs, rule)
    run(optimizer, named, range(2))
    assert optimizer.param_groups[0]["param_names"] == list(SHAPES)
    assert not torch.equal(named[0], unnamed[0])
    same(named[1:], unnamed[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1: give a finite number"),
        ({"lr": NAN}, "lr is nan"),
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


@pytest.mark.parametrize("name", ["sgd", "adam", "rms"])
def test_hand_made_rules_by_name_have_their_defaults(name):
    a, b = make_parameters(), make_parameters()
    run(LearnedOptimizer(a, name), a, range(2))
    run(LearnedOptimizer(b, make_rule(name)), b, range(2))
    same(a, b)


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


def test_a_rule_of_ones_own_with_plain_tuples_as_memory():
    class Remembers(SGD):
        name = "remembers"

        def observe(self, thetas, grads, state, priors):
            seen, _ = super().observe(thetas, grads, state, priors)
            past = state.memory or [(torch.zeros_like(g[:, :1]), g.new_zeros(())) for g in grads]
            return seen, [(row + 1, count + g.sum()) for (row, count), g in zip(past, grads, strict=True)]

    parameters = make_parameters()
    optimizer = LearnedOptimizer(parameters, Remembers(0.1))
    run(optimizer, parameters, range(3))
    state = optimizer.state[parameters[0]]
    assert torch.equal(state["memory0"], torch.full((7, 1), 3.0, dtype=torch.float64))
    torch.testing.assert_close(state["memory1"], sum(gradients(s)[0].sum() for s in range(3)))


@for_rules
def test_rules_survive_the_folder(name, tmp_path):
    rule = moved(name)
    file = dynlm.optim.save_pretrained(rule, tmp_path / "rule", {"steps": 7})
    for place in (tmp_path / "rule", str(tmp_path / "rule"), file):
        again = dynlm.optim.load(place)
        assert isinstance(again, Rule)
        assert hub.fingerprint(again) == hub.fingerprint(rule)
    card = (tmp_path / "rule" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert f"`{name}`" in card
    assert "- steps: 7" in card
    a, b = make_parameters(), make_parameters()
    run(LearnedOptimizer(a, str(tmp_path / "rule")), a, range(2))
    run(LearnedOptimizer(b, rule), b, range(2))
    same(a, b)


def test_rules_that_ship_go_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PRETRAINED", tmp_path)
    with pytest.raises(InputError, match=r"no rule 'general': .* or one that ships \(none yet\)"):
        LearnedOptimizer(make_parameters())
    dynlm.optim.save_pretrained(General(seed=3), tmp_path / "made")
    shutil.copy(tmp_path / "made" / "rule.safetensors", tmp_path / "general.safetensors")
    optimizer = LearnedOptimizer(make_parameters())
    assert hub.fingerprint(optimizer.rule) == hub.fingerprint(General(seed=3))
    with pytest.raises(InputError, match=r"no rule 'other': .* or one that ships \(general\)"):
        dynlm.optim.load("other")


def test_the_hub_is_asked_for_what_is_no_path(tmp_path, monkeypatch):
    file, asked = dynlm.optim.save_pretrained(General(), tmp_path), []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names: asked.append(names) or str(file))
    assert hub.fingerprint(dynlm.optim.load("somebody/rule")) == hub.fingerprint(General())
    assert asked == [("somebody/rule", "rule.safetensors")]

    def offline(*_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match=r"no local path 'somebody/rule'.*no connection\): check both$"):
        dynlm.optim.load("somebody/rule")


def test_a_rule_is_uploaded_as_it_is_saved(monkeypatch):
    done = []

    class Api:
        def create_repo(self, repo_id, exist_ok):
            done.append(("create", repo_id, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            rule = dynlm.optim.load(folder_path)
            done.append(("upload", repo_id, hub.fingerprint(rule)))
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert dynlm.optim.push_to_hub(General(), "somebody/rule") == "address"
    assert done == [("create", "somebody/rule", True), ("upload", "somebody/rule", hub.fingerprint(General()))]
    with pytest.raises(InputError, match="'rule' is not the name of a hub repository"):
        dynlm.optim.push_to_hub(General(), "rule")

    def refuse(*_, **__):
        raise OSError("no login")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(InputError, match=r"cannot upload to somebody/rule \(no login\)"):
        dynlm.optim.push_to_hub(General(), "somebody/rule")


def test_broken_rule_files_are_one_clear_line(tmp_path):
    file = dynlm.optim.save_pretrained(General(), tmp_path)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match="truncated or not safetensors"):
        dynlm.optim.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="does not exist"):
        LearnedOptimizer(make_parameters(), tmp_path / "empty")


def test_the_optimizer_needs_no_framework():
    code = "import dynlm.optim, sys; dynlm.optim.LearnedOptimizer; dynlm.optim.load; " + "; ".join(
        f"assert {name!r} not in sys.modules" for name in ("transformers", "accelerate", "huggingface_hub", "datasets")
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        dynlm.optim.Nothing  # noqa: B018
