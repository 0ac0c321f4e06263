"""A rule of a user's own program, one class and one row, goes through every stage."""

import importlib
import json

import pytest
import torch

from dynlm.cli.main import main
from dynlm.meta.replay import Replay
from dynlm.meta.unroll import Unroll, UnrollConfig
from dynlm.optim.library import load_rule
from dynlm.optim.registry import RULES
from dynlm.runs import Run
from dynlm.stages.run import methods_of
from lab import make_lab, needs_compiler
from support.steps import assert_fused_is_plain, make_priors
from support.windows import gradients, read_window

PROGRAM = '''
from dynlm import Rule
from dynlm.optim import Range, columns, register, scalar
from dynlm.optim.linear import Linear


class Momentum(Rule):
    """A step along a running mean of the gradient's direction, with decay to the prior."""

    name = "momentum"
    n_slots = 1
    context_shapes = ((), (), ())

    def __init__(self, lr=1e-4, decay=1e-3, keep=0.5):
        super().__init__()
        self.lr, self.decay, self.keep = scalar(lr), scalar(decay), scalar(keep)

    def context(self, shared):
        return columns(shared, self.lr, self.decay, self.keep)

    def step(self, w, slots, context, expand=False):
        lr, decay, keep = context
        mean = keep * slots[0] + (1 - keep) * w.grad / (w.rms + w.grad.abs() + 1e-6)
        return w.theta - lr * mean + decay * (w.theta0 - w.theta), (mean,)


class Affine(Linear):
    name = "affine"


register(Momentum, {"lr": Range(8e-3, 8e1, 1.6, "direction"), "decay": Range(1e-6, 3e-1, 1e-3)})
register(Affine, start="sgd")
'''


@pytest.fixture
def program(tmp_path, monkeypatch, own_rules):
    """The user's module, imported anew."""
    (tmp_path / "own_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.sys.modules, "own_program", raising=False)
    return importlib.import_module("own_program")


@pytest.mark.usefixtures("program", "plain_reports")
def test_it_is_tuned_trained_evaluated_and_told_by_its_kind(copy, capsys):
    recipe, run = copy
    base = [str(recipe), "--run", str(run)]
    assert main(["tune", *base, "--tune.rules", "momentum", "--tune.trials", "4"]) == 0
    assert main(["meta-train", *base, "--meta.rule", "affine", "--meta.hidden", "0"]) == 0
    assert sorted(path.name for path in (run / "rules").iterdir()) == [
        f"{name}.safetensors" for name in ("affine", "gated", "momentum", "rms", "sgd")
    ]
    assert load_rule(Run(run).rule("momentum"))[0].settings()["lr"] > 0
    methods = ["--evaluate.methods", "static", "momentum", "affine"]
    assert main(["evaluate", *base, "--overwrite", *methods]) == 0
    found = json.loads(Run(run).results.read_text())["methods"]
    assert {name: (m["rule"], m["kind"]) for name, m in found.items()} == {
        "static": ("static", "baseline"),
        "momentum": ("momentum", "hand-made"),
        "affine": ("affine", "learned"),
    }
    assert found["momentum"]["nats"] < found["static"]["nats"]
    page = Run(run).report.read_text()
    assert 'momentum <span class="kind">hand-made' in page
    assert 'affine <span class="kind">learned' in page
    assert methods_of(Run(run), ()) == ["static", "stateless", "affine", "gated", "momentum", "rms", "sgd"]
    assert main(["read", "--run", str(run), "--rule", "momentum", str(recipe)]) == 0
    assert "momentum" in capsys.readouterr().out


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_its_compiled_step_is_the_plain_one(program, dtype, tolerance):
    assert_fused_is_plain(program.Momentum(0.02, 0.01), make_priors(dtype), True, tolerance)


def test_its_replay_is_its_unroll(program):
    lab = make_lab()
    rule = program.Momentum(0.02, 0.01)
    recording, start, pieces, weights, adapted = read_window(lab, rule, 42)
    Replay(rule)(recording)
    replayed = gradients(rule)
    Unroll(lab[1], rule, adapted, lab[2], UnrollConfig(), trust=3.0).run(start, pieces, weights).loss.backward()
    unrolled = gradients(rule)
    assert set(replayed) == {"lr", "decay", "keep"}
    for name, expected in unrolled.items():
        assert expected.abs() > 0
        torch.testing.assert_close(replayed[name], expected, rtol=1e-9, atol=1e-13)


def test_no_test_leaves_its_rules_behind():
    assert not {"momentum", "affine", "sign"} & set(RULES)
