"""A rule that diverges is marked, in tuning and in evaluation, and the others go on."""

import json
from dataclasses import replace

import pytest

from dynlm.cli.main import main
from dynlm.optim.handmade import SGD
from dynlm.optim.registry import DECAY, RULES
from dynlm.optim.sharing import save_rule
from dynlm.runs import Run
from support.commands import fails

pytestmark = pytest.mark.usefixtures("plain_reports")


@pytest.fixture
def broken(copy):
    """A run whose sgd takes steps that no model survives."""
    recipe, run = copy
    save_rule(SGD(1e30, 1e20), Run(run).rule("sgd"))
    return recipe, run


def test_a_method_that_diverges_is_marked_and_the_others_go_on(broken, capsys):
    recipe, run = broken
    methods = ["--evaluate.methods", "static", "sgd", "rms"]
    assert main(["evaluate", str(recipe), "--run", str(run), "--overwrite", "--json", *methods]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert sorted(figures["methods"]) == ["rms", "static"]
    (name, why), *rest = figures["diverged"].items()
    assert (name, rest) == ("sgd", [])
    assert why.startswith("article 0 (")
    assert " by rule 'sgd': lower its lr" in why
    results = json.loads(Run(run).results.read_text())
    assert results["diverged"] == figures["diverged"]
    assert sorted(results["methods"]) == ["rms", "static"]
    assert "<strong>sgd diverged</strong>" in Run(run).report.read_text()


def test_a_rule_that_cannot_be_tuned_keeps_no_other_from_it(copy, capsys, monkeypatch):
    recipe, run = copy
    row = RULES["sgd"]
    monkeypatch.setitem(RULES, "sgd", replace(row, space={**row.space, "decay": DECAY.times(1e20)}))
    before = Run(run).rule("sgd").read_bytes()
    arguments = ["tune", recipe, "--run", run, "--overwrite", "--tune.rules", "sgd", "rms", "--tune.trials", "2"]
    message = fails(capsys, arguments, "reading with rule 'sgd' diverged at each of")
    assert "broken" not in message
    assert Run(run).rule("sgd").read_bytes() == before
    assert (
        b'"trials": 2' in Run(run).rule("rms").read_bytes() or b'\\"trials\\": 2' in Run(run).rule("rms").read_bytes()
    )
