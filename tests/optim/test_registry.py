"""The table of rules: what may join it, and what a rule has of its row."""

import pytest
import torch

from dynlm.meta.train import MetaConfig
from dynlm.meta.tune import TuneConfig, search_space
from dynlm.optim import LearnedOptimizer, Range, columns, load, register, registry, scalar
from dynlm.optim.base import Rule
from dynlm.optim.library import load_rule, make_rule, start_rule
from dynlm.optim.linear import Linear
from dynlm.optim.sharing import save_rule
from dynlm.types import InputError
from support.steps import make_priors

SPACE = {"lr": Range(1e-4, 1.0, 1e-2)}
pytestmark = pytest.mark.usefixtures("own_rules")


class Sign(Rule):
    name = "sign"
    context_shapes = ((),)

    def __init__(self, lr=1e-4):
        super().__init__()
        self.lr = scalar(lr)

    def context(self, shared):
        return columns(shared, self.lr)

    def step(self, w, slots, context, expand=False):
        return w.theta - context[0] * w.grad / (w.grad.abs() + 1e-12), slots


class OwnCell(Linear):
    name = "own_cell"


def variant(**attributes):
    return type("Variant", (Sign,), {"__module__": "elsewhere", **attributes})


def test_a_registered_rule_is_made_saved_loaded_and_an_optimizer_by_its_name(tmp_path):
    register(Sign, SPACE)
    save_rule(make_rule("sign", lr=0.5), tmp_path / "sign.safetensors")
    assert load_rule(tmp_path / "sign.safetensors")[0].settings() == {"lr": 0.5}
    assert load("sign").settings() == pytest.approx({"lr": 1e-4})
    weight = torch.nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.full((2, 3), 7.0)
    LearnedOptimizer([weight], "sign").step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 3), 1 - 1e-4))
    assert "sign" in TuneConfig(rules=("sign",)).rules
    save_rule(make_rule("sgd"), tmp_path / "sign")
    with pytest.raises(InputError, match="holds a rule of kind 'sgd', not 'sign'"):
        load_rule(tmp_path / "sign")


def test_a_cell_of_ones_own_is_meta_trained_from_the_rule_of_its_row():
    with pytest.raises(InputError, match="rule is 'own_cell': expected one of 'linear', 'gated', "):
        MetaConfig(rule="own_cell")
    register(OwnCell, start="sgd")
    assert MetaConfig(rule="own_cell").rule == "own_cell"
    assert start_rule("own_cell", {"lr": 0.25}, [], hidden=9).settings() == {"weight": -0.25, "bias": 0.0}
    assert registry.made_by("own_cell") == "meta-train"


def test_a_class_that_is_defined_again_takes_its_row():
    register(Sign)
    again = type("Sign", (Sign,), {"__module__": Sign.__module__, "__qualname__": "Sign"})
    register(again, SPACE)
    assert registry.RULES["sign"].rule is again


@pytest.mark.parametrize(
    ("rule", "more", "message"),
    [
        (variant(name="sgd"), {}, r"a rule 'sgd' is there already \(SGD\): give yours another name"),
        (variant(name="stateless"), {}, "no rule can be called 'stateless'"),
        (variant(name="cache"), {}, "no rule can be called 'cache'"),
        (variant(name="sign#1"), {}, "no rule can be called 'sign#1'"),
        (variant(name="../sign"), {}, "no rule can be called '../sign'"),
        (variant(name="a", __init__=lambda self, rate: None), {}, "rule 'a' needs 'rate' to be made"),
        (variant(name="a"), {"space": {"lr": SPACE["lr"], "eps": SPACE["lr"]}}, "the space of rule 'a' has lr, eps"),
        (variant(name="a"), {"space": {"rate": SPACE["lr"]}}, "it must have lr"),
        (variant(name="a"), {"start": "sgd"}, "rule 'a' cannot start at 'sgd': it needs `started_at`"),
        (OwnCell, {"start": "gated"}, "rule 'own_cell' cannot start at 'gated': .* one of sgd, rms, adam"),
    ],
)
def test_rows_that_cannot_be_are_refused(rule, more, message):
    before = dict(registry.RULES)
    with pytest.raises(InputError, match=message):
        register(rule, **more)
    assert before == registry.RULES


def test_unknown_rules_are_told_of_the_known_ones():
    with pytest.raises(InputError, match=r"unknown rule 'sign': choose one of static, sgd, .* or dynlm.optim.register"):
        make_rule("sign")


@pytest.mark.parametrize(("unit", "promise"), [("gradient", lambda r: r.square()), ("direction", lambda r: r)])
def test_rates_are_searched_in_units_of_what_a_step_promises(unit, promise):
    """A nat to first order, for a step along g and for one along g / |g|; the start may not be a large step."""
    priors = [p._replace(rms=p.rms + 1e-3) for p in make_priors(torch.float64)]
    register(Sign, {"lr": Range(0.1, 10.0, 1.0, unit)})
    promised = sum(float(promise(p.rms).sum()) for p in priors)
    largest = 1.25e-3 * (priors[0].relative_rms if unit == "gradient" else 1)
    assert search_space("sign", priors)["lr"].start == pytest.approx(min(1 / promised, largest), rel=2e-3)
