"""What LearnedOptimizer keeps of each parameter: resumed, copied, refused, in what dtype; its priors."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from dynlm.optim import LearnedOptimizer
from dynlm.optim.base import Clock, Prior
from dynlm.optim.gated import Gated, GatedConfig
from dynlm.optim.handmade import SGD
from dynlm.types import InputError
from lab import needs_compiler
from support.optimizers import (
    SEE_SURPRISE,
    SHAPES,
    SLOTTED,
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
def test_a_new_group_starts_at_its_own_age(name):
    first, *rest = parameters = make_parameters()
    optimizer = LearnedOptimizer([first], moved(name))
    give(parameters, 0)
    optimizer.step()
    optimizer.add_param_group({"params": rest, "lr": 0.5, "weight_decay": 0.1})
    run(optimizer, parameters, [1, 2])
    assert [optimizer.state[p]["step"] for p in parameters] == [3, 2, 2, 2]
    assert [g["lr"] for g in optimizer.param_groups] == [moved(name).reference_lr, 0.5]
    assert all(torch.isfinite(p).all() for p in parameters)
    assert not any(torch.equal(p, q) for p, q in zip(parameters, make_parameters(), strict=True))


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


def test_a_pickled_optimizer_keeps_its_options_before_the_first_step():
    parameters = make_parameters(torch.float32)
    optimizer = LearnedOptimizer(parameters, "adam", state_dtype=torch.bfloat16, max_grad_norm=0.5, lr=0.3)
    other, others = pickle.loads(pickle.dumps((optimizer, parameters)))
    for one, its in ((optimizer, parameters), (other, others)):
        run(one, its, range(2))
    same(parameters, others)
    assert other.state[others[0]]["slot0"].dtype == torch.bfloat16


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


def test_names_do_not_change_what_a_rule_does():
    rule = Gated(GatedConfig(lr=0.01))
    with torch.no_grad():
        rule.output_traits += 0.5
    unnamed, pairs = make_parameters(), named_parameters()
    named = [p for _, p in pairs]
    run(LearnedOptimizer(unnamed, rule), unnamed, range(2))
    optimizer = LearnedOptimizer(pairs, rule)
    run(optimizer, named, range(2))
    assert optimizer.param_groups[0]["param_names"] == list(SHAPES)
    same(named, unnamed)
