"""A swap is a swap: the units, arguments, schedulers and groups of AdamW, and state that follows its parameters."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynlm
from dynlm.optim import LearnedOptimizer, load, save_pretrained
from dynlm.optim.handmade import RMS, SGD, Adam
from dynlm.types import InputError
from lab import needs_compiler
from support.optimizers import SLOTTED, for_rules, give, make_parameters, moved, run, same

schedulers = torch.optim.lr_scheduler


@for_rules
def test_default_rate_is_the_reference_and_makes_the_rules_own_step(name):
    rule = moved(name)
    parameters, others = make_parameters(), make_parameters()
    optimizer = LearnedOptimizer(parameters, rule)
    assert optimizer.param_groups[0]["lr"] == rule.reference_lr
    run(optimizer, parameters, range(3))
    run(LearnedOptimizer(others, rule, lr=rule.reference_lr), others, range(3))
    same(parameters, others)


def test_references_are_adamws_rate_and_the_rules_own():
    found = [rule.reference_lr for rule in (load("general"), SGD(0.3), Adam(0.02), RMS(2e-3), SGD(0.0))]
    assert found == [1e-3, 0.3, 0.02, 2e-3, 1.0]


@for_rules
def test_half_the_rate_makes_half_the_step_and_decay_is_rate_times_decay(name):
    rule = moved(name)
    whole, half, decayed = (make_parameters() for _ in range(3))
    run(LearnedOptimizer(whole, rule), whole, [0])
    run(LearnedOptimizer(half, rule, lr=rule.reference_lr / 2), half, [0])
    run(LearnedOptimizer(decayed, rule, weight_decay=0.1), decayed, [0])
    for start, one, a_half, less in zip(make_parameters(), whole, half, decayed, strict=True):
        torch.testing.assert_close(2 * (a_half - start), one - start, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(less, one - 0.1 * rule.reference_lr * start, rtol=1e-9, atol=1e-12)


def test_adam_follows_the_rate_of_its_group_as_torchs_adamw_does():
    ours, theirs = make_parameters(), make_parameters()
    a = LearnedOptimizer(ours, Adam(1e-3), lr=0.02, weight_decay=0.1)
    b = torch.optim.AdamW(theirs, 0.02, weight_decay=0.1)
    for step in range(8):
        for optimizer, parameters in ((a, ours), (b, theirs)):
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)  # as research code writes it
            give(parameters, step)
            optimizer.step()
    same(ours, theirs, 1e-12)


ARGUMENTS = {"betas": (0.8, 0.95), "eps": 1e-6, "foreach": True, "fused": False, "capturable": False, "amsgrad": False}


def test_arguments_of_adamw_are_taken_and_change_nothing():
    a, b = make_parameters(), make_parameters()
    run(LearnedOptimizer(a, lr=1e-3, weight_decay=0.1, **ARGUMENTS), a, range(3))
    run(LearnedOptimizer(b, lr=1e-3, weight_decay=0.1), b, range(3))
    same(a, b)
    with pytest.raises(TypeError, match="momentum"):
        LearnedOptimizer(a, momentum=0.9)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: schedulers.OneCycleLR(o, max_lr=2e-3, total_steps=8),
        lambda o: schedulers.CyclicLR(o, 1e-4, 1e-3, step_size_up=2),
        lambda o: schedulers.CosineAnnealingLR(o, 8),
        lambda o: schedulers.LinearLR(o, 0.1, total_iters=4),
    ],
    ids=["one-cycle", "cyclic", "cosine", "warm-up"],
)
def test_schedulers_of_torch_with_their_defaults_move_the_rate_as_for_adamw(make):
    rates = []
    for kind in (LearnedOptimizer, torch.optim.AdamW):
        parameters = make_parameters(torch.float32)
        optimizer = kind(parameters, lr=1e-3)
        scheduler = make(optimizer)
        seen = []
        for step in range(6):
            give(parameters, step)
            optimizer.step()
            scheduler.step()
            seen.append(optimizer.param_groups[0]["lr"])
        rates.append(seen)
    assert rates[0] == rates[1]


def test_repr_shows_what_a_user_sets():
    text = repr(LearnedOptimizer(make_parameters(), weight_decay=0.1))
    assert text == "LearnedOptimizer(rule='general', lr=0.001, weight_decay=0.1, maximize=False)"


def test_state_of_an_earlier_version_is_refused_with_what_to_do():
    optimizer = LearnedOptimizer(make_parameters())
    state = optimizer.state_dict()
    del state["param_groups"][0]["betas"]
    with pytest.raises(InputError, match=r"multiply lr by 0.001, divide weight_decay by it"):
        optimizer.load_state_dict(state)


# State that follows its parameters: `net.double()` converts them in place, and they stay the same objects.


def train_converted(rule, there, copied):
    torch.manual_seed(0)
    start = torch.float32 if there == "double" else torch.float64
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).to(start)
    x, y = torch.randn(32, 8, dtype=torch.float64), torch.randint(4, (32,))
    optimizer = LearnedOptimizer(net.parameters(), rule=rule)
    for step in range(10):
        if step == 5 and copied:
            net = getattr(copy.deepcopy(net), there)()
            fresh = LearnedOptimizer(net.parameters(), rule=rule)
            fresh.load_state_dict(optimizer.state_dict())
            optimizer = fresh
        elif step == 5:
            getattr(net, there)()
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x.to(net[0].weight.dtype)), y)
        loss.backward()
        optimizer.step()
    return loss.item()


@needs_compiler
@pytest.mark.parametrize("there", ["double", "float"])
@pytest.mark.parametrize("rule", ["general", "adam", "rms"])
def test_training_goes_on_after_a_conversion_in_place(rule, there, monkeypatch):
    monkeypatch.delenv("DYNLM_KERNEL", raising=False)
    found = train_converted(rule, there, copied=False)
    assert found == pytest.approx(train_converted(rule, there, copied=True), abs=1e-6)
    assert found == pytest.approx({"general": 0.2012, "adam": 1.3818, "rms": 1.3497}[rule], abs=1e-4)


@for_rules
def test_state_of_every_rule_follows_a_conversion(name):
    parameters = make_parameters(torch.float32)
    optimizer = LearnedOptimizer(parameters, moved(name))
    run(optimizer, parameters, range(2))
    for p in parameters:
        p.data = p.data.double()
    run(optimizer, parameters, [2])
    for p in parameters:
        assert {t.dtype for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)} <= {torch.float64}
        assert torch.isfinite(p).all()


def test_a_parameter_of_another_shape_is_one_clear_line():
    parameters = make_parameters()
    optimizer = LearnedOptimizer(parameters, "adam")
    run(optimizer, parameters, range(2))
    parameters[0].data = torch.zeros(3, 3, dtype=torch.float64)
    parameters[0].grad = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(InputError, match=r"saved 'slot0' is \(7, 3\), not \(3, 3\)"):
        optimizer.step()


# bfloat16 state


@pytest.mark.parametrize("kernel", ["eager", pytest.param("compiled", marks=needs_compiler)])
def test_bfloat16_second_moment_decays(kernel, monkeypatch):
    """Rounded to nearest, a moment that loses 1/1000 of itself a step would stay where it was for ever."""
    monkeypatch.setenv("DYNLM_KERNEL", "eager") if kernel == "eager" else monkeypatch.delenv("DYNLM_KERNEL", False)
    moments = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(2000))
        optimizer = LearnedOptimizer([p], rule=Adam(lr=1e-3), state_dtype=dtype)
        for step in range(1500):
            p.grad = torch.randn(2000) * (1.0 if step < 100 else 0.01)
            optimizer.step()
        moments.append(optimizer.state[p]["slot1"].float().mean().item())
    assert moments[0] == pytest.approx(0.095 * 0.999**1400, rel=0.05)
    assert moments[1] == pytest.approx(moments[0], rel=0.02)


@needs_compiler
def test_rounding_is_the_same_in_kernels_and_unbiased(monkeypatch):
    from dynlm.optim.rounding import rounded

    x = torch.full((64, 64), 1 + 2**-10)  # a quarter of the way between two numbers of bfloat16
    values = [rounded(x, torch.bfloat16, step, 0, 1).float().mean().item() for step in range(8)]
    assert sum(values) / 8 == pytest.approx(1 + 2**-10, abs=1e-4)
    states = []
    for kernel in ("eager", "compiled"):
        monkeypatch.setenv("DYNLM_KERNEL", kernel)
        p = nn.Parameter(torch.zeros(50, 3))
        optimizer = LearnedOptimizer([p], Adam(1e-3), state_dtype=torch.bfloat16)
        p.grad = torch.linspace(-1, 1, 150).view(50, 3)
        optimizer.step()
        states.append(optimizer.state[p]["slot1"].clone())
    assert (states[0] != states[1]).float().mean() < 0.02  # where float32 itself differs by rounding


@pytest.mark.parametrize("name", SLOTTED)
def test_bfloat16_state_repeats_bitwise(name):
    runs = []
    for _ in range(2):
        parameters = make_parameters(torch.float32)
        run(LearnedOptimizer(parameters, moved(name), state_dtype=torch.bfloat16), parameters, range(4))
        runs.append(parameters)
    same(*runs)


# sharded parameters, and rules by name

SHARDED = """
import tempfile, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from dynlm import InputError, LearnedOptimizer

dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tempfile.mkdtemp()}/store")
net = nn.Linear(8, 4)
fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
try:
    LearnedOptimizer(net.parameters())
except InputError as error:
    print("refused:", error)
dist.destroy_process_group()
"""


def test_sharded_parameters_are_refused_in_one_line():
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "refused: a parameter is sharded" in done.stdout


def test_rules_are_loaded_by_name_file_or_folder(tmp_path):
    path = save_pretrained(load("general"), tmp_path)
    for name in (path, str(path), tmp_path, str(tmp_path), "general"):
        assert dynlm.rules.from_pretrained(name).name == "general"
    assert load("sgd").name == "sgd"
    for wrong in ("x" * 5000, "nope", tmp_path / "nope"):
        with pytest.raises(InputError, match="no rule") as caught:
            load(wrong)
        assert len(str(caught.value)) < 400
    with pytest.raises(InputError, match="not from int 3"):
        load(3)


def test_the_card_of_a_shipped_rule_says_how_it_was_made(tmp_path):
    save_pretrained(load("general"), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "recipes/general.toml" in card
    assert "not recorded" not in card
    assert math.isfinite(load(tmp_path).made["meta_validation"])
