"""One contract over every rule, the limit cases of the learned one, and the fused step against the plain reference."""

import shutil
from dataclasses import replace

import pytest
import torch

from dynlm.optim import registry
from dynlm.optim.base import Clock, Coordinates
from dynlm.optim.gated import Gated
from dynlm.optim.handmade import RMS, SGD, Adam
from dynlm.optim.kernel import InPlaceUpdate
from dynlm.optim.library import load_rule, make_rule, start_rule
from dynlm.optim.sharing import save_rule
from dynlm.types import InputError
from lab import needs_compiler
from support.rules import RULES, SETTINGS, make, moved
from support.steps import assert_fused_is_plain, grads_at, make_priors, run_fused, run_plain


def test_the_table_of_the_tests_covers_the_registry():
    """A rule that is registered is tested by everything that goes over rules: add it to tests/support/rules.py."""
    assert RULES.keys() == registry.RULES.keys()


@pytest.mark.parametrize("name", RULES)
def test_contract_shapes_dtypes_and_untouched_inputs(name):
    priors = make_priors(torch.float32)
    rule = make(name, priors, torch.float32)
    before = [p.theta0.clone() for p in priors]
    thetas, state = run_plain(rule, priors, 3)
    for theta, slots, prior, saved in zip(thetas, state.slots, priors, before, strict=True):
        assert theta.shape == prior.theta0.shape
        assert theta.dtype == torch.float32
        assert len(slots) == rule.n_slots
        width = (rule.slot_width,) if rule.slot_width else ()
        assert all(s.shape == theta.shape + width and s.dtype == theta.dtype for s in slots)
        assert torch.isfinite(theta).all()
        assert torch.equal(prior.theta0, saved)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_fused_step_equals_the_plain_update(name, compiled, dtype, tolerance):
    priors = make_priors(dtype)
    rule = make(name, priors, dtype)
    assert_fused_is_plain(rule, priors, compiled, tolerance)


@needs_compiler
@pytest.mark.parametrize("name", registry.trained())
def test_fused_step_equals_the_plain_update_where_a_cell_starts(name):
    priors = make_priors(torch.float64)
    assert_fused_is_plain(start_rule(name, SETTINGS, priors).double(), priors, True, 1e-11)


@pytest.mark.parametrize("name", [name for name in RULES if make(name, make_priors(torch.float64)).traceable])
def test_scalar_code_equals_matrix_products(name, monkeypatch):
    priors = make_priors(torch.float64)
    rule, prior = make(name, priors), priors[0]
    clock = Clock()
    clock.tick(3.0)
    grad = torch.randn_like(prior.theta0)
    seen, _ = rule.observe([prior.theta0], [grad], replace(rule.init([prior]), clock=clock), [prior])
    w = Coordinates(prior.theta0 + 0.1, prior.theta0, prior.rms, grad, seen.rows[0], seen.cols[0])
    slots = tuple(torch.rand_like(grad) for _ in range(rule.n_slots))
    context_nN, _ = rule.tensor_step(rule.shared([prior], seen.scalars, [clock.step]), rule.init([prior]).tensors)
    context = rule.split(context_nN[0].to(grad))
    theta, new_slots = rule.step(w, slots, context)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    theta_expanded, slots_expanded = rule.step(w, slots, context)
    torch.testing.assert_close(theta_expanded, theta, rtol=1e-12, atol=1e-14)
    for a, b in zip(slots_expanded, new_slots, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_gated_rule_starts_exactly_at_its_rms_rule():
    priors = make_priors(torch.float64)
    gated, _ = run_plain(Gated.started_at(SETTINGS, priors).double(), priors, 6)
    rms, _ = run_plain(RMS(**SETTINGS), priors, 6)
    for a, b in zip(gated, rms, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=0)  # the gated rule's settings are kept in float32


@pytest.mark.parametrize(
    ("kind", "theirs", "settings", "tolerance"),
    [
        (SGD, torch.optim.SGD, {"lr": 0.1}, 1e-13),
        (SGD, torch.optim.SGD, {"lr": 0.03}, 1e-13),
        (Adam, torch.optim.Adam, {"lr": 0.01, "eps": 1e-6}, 1e-12),
    ],
)
def test_without_decay_they_are_torchs(kind, theirs, settings, tolerance):
    priors = make_priors(torch.float64)
    ours, _ = run_plain(kind(**settings), priors, 8)
    parameters = [torch.nn.Parameter(p.theta0.clone()) for p in priors]
    torchs = theirs(parameters, **settings)
    for step in range(8):
        for parameter, grad in zip(parameters, grads_at(priors, step), strict=True):
            parameter.grad = grad
        torchs.step()
    for a, b in zip(ours, parameters, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance / 100)


def test_rms_is_krauses_rule_with_decay_clipped():
    priors = make_priors(torch.float64)
    (theta, _), _ = run_plain(RMS(lr=0.01, eps=1e-3, decay=0.9), priors, 1)
    first = priors[0]
    expected = first.theta0 - 0.01 * grads_at(priors, 0)[0] / (first.rms + 1e-3)  # δ is zero: no pull yet
    torch.testing.assert_close(theta.detach(), expected, rtol=1e-13, atol=1e-15)
    still = Coordinates(theta, first.theta0, first.rms, torch.zeros_like(theta), (), ())
    rule = RMS(lr=0.01, eps=1e-3, decay=0.9)
    back, _ = rule.flat_step(still, (), rule.context(rule.shared([first], theta.new_empty(1, 0), [1]))[0])
    strong = 0.9 * first.relative_rms * first.rms >= 1
    assert strong.any()
    assert torch.equal(back[strong], first.theta0[strong])  # at most all the way back


def test_zero_rate_never_moves_a_weight():
    priors = make_priors(torch.float32)
    for rule in (SGD(0.0), RMS(0.0, 1e-3, 0.0), Adam(0.0)):
        for compiled in (False, bool(shutil.which("gcc"))):
            thetas, _ = run_fused(rule, priors, 4, compiled)
            assert all(torch.equal(theta, p.theta0) for theta, p in zip(thetas, priors, strict=True))


@needs_compiler
def test_a_nan_gradient_stays_visible_in_the_compiled_step():
    priors = make_priors(torch.float32)
    rule = moved(Gated.started_at(SETTINGS, priors))
    for compiled in (False, True):
        thetas, state = [p.theta0.clone() for p in priors], rule.init(priors)
        state.clock.tick(3.0)
        grads = grads_at(priors, 0)
        grads[0][2, 2] = float("nan")
        InPlaceUpdate(rule, compiled)(thetas, grads, state, priors)
        assert thetas[0][2, 2].isnan()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["adam", "general"])
def test_torch_compiles_the_same_step(name, monkeypatch):
    """What a GPU with Triton runs, here by torch's C++ code."""
    monkeypatch.setenv("DYNLM_KERNEL", "torch")
    priors = make_priors(torch.float32)
    rule = make(name, priors)
    with torch.no_grad():
        plain, _ = run_plain(rule, priors, 3)
    compiled, _ = run_fused(rule, priors, 3, None)
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-5)


def test_compiled_kernel_without_a_compiler_is_an_error(monkeypatch):
    monkeypatch.setenv("DYNLM_KERNEL", "eager")
    with pytest.raises(InputError, match="'compiled', but DYNLM_KERNEL is 'eager'"):
        InPlaceUpdate(SGD(), compiled=True)


@pytest.mark.parametrize("kind", RULES)
def test_rules_survive_the_disk(tmp_path, kind):
    priors = make_priors(torch.float32)
    rule = make(kind, priors, torch.float32)
    save_rule(rule, tmp_path / kind, {"trials": 3})
    again, made = load_rule(tmp_path / kind)
    assert made == {"trials": 3}
    assert again.settings() == rule.settings()
    for (name, a), (other, b) in zip(rule.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def test_broken_rule_files_are_one_clear_line(tmp_path):
    path = tmp_path / "rms"
    with pytest.raises(InputError, match="does not exist"):
        load_rule(path)
    save_rule(RMS(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(InputError, match="truncated or not safetensors"):
        load_rule(path)
    with pytest.raises(InputError, match="unknown rule 'magic'"):
        make_rule("magic")


@pytest.mark.parametrize("name", registry.trained())
def test_a_rule_knows_tensors_by_their_traits_and_not_by_their_names(name):
    """So that it reads models that it was not made for."""
    priors = make_priors(torch.float64)
    rule = moved(start_rule(name, SETTINGS, priors).double())
    plain, _ = run_plain(rule, priors, 2)
    renamed, _ = run_plain(rule, [p._replace(name=f"other.{p.name}") for p in priors], 2)
    for a, b in zip(plain, renamed, strict=True):
        assert torch.equal(a, b)
