"""Learning a start on articles, reading from it, and planning: as commands."""

import json
import shutil

import pytest
import torch

from dynlm.cli.main import main
from dynlm.files import read_tensors, write_tensors
from dynlm.runs import Run
from support.commands import fails, files

pytestmark = pytest.mark.usefixtures("plain_reports")

SHORT = ["--start.segments", "4", "--start.outer.steps", "4", "--start.outer.tasks", "2"]


def learn(run, *more):
    return main(["learn-start", "--run", str(run), *SHORT, *more])


@pytest.mark.parametrize("method", ["fomaml", "joint"])
def test_a_learned_start_is_kept_and_read_from(copy, method, capsys):
    _, path = copy
    run = Run(path)
    before = files(path)
    assert learn(path, "--start.method", method, "--start.outer.lr", "3e-3") == 0
    assert {p for p, data in files(path).items() if before.get(p) != data} == {run.start(method), run.provenance}
    tensors, made = read_tensors(run.start(method))
    theta0 = {name: t for name, t in read_tensors(run.model / "model.safetensors")[0].items() if name in tensors}
    assert set(theta0) == set(tensors)
    assert made["best_step"] == 4  # the start is better for reading than the trained weights
    assert dict(made["valid"])[4] < dict(made["valid"])[0]
    assert all(not torch.equal(theta0[name], t) for name, t in tensors.items())
    assert [step for step, _ in made["valid"]] == [0, 4]
    assert len(made["train"]) == 4
    name = f"gated@{method}"
    arguments = ["--run", str(path), "--overwrite", "--evaluate.methods", "static", "gated", name, "static@" + method]
    assert main(["evaluate", *arguments]) == 0
    methods = json.loads(run.results.read_text())["methods"]
    assert methods[name]["nats"] != methods["gated"]["nats"]
    assert methods["static@" + method]["nats"] != methods["static"]["nats"]
    assert name in run.report.read_text()
    fails(capsys, ["learn-start", "--run", path, "--start.method", method], "exists", "--overwrite")


def test_the_rule_is_learned_together_with_the_start(copy):
    _, path = copy
    assert learn(path, "--start.outer.phi-lr", "1e-2", "--start.outer.lr", "3e-3") == 0
    tensors, made = read_tensors(Run(path).start("fomaml"))
    phi = {name for name in tensors if name.startswith("rule.")}
    rule, _ = read_tensors(Run(path).rule("gated"))
    assert phi == {f"rule.{name}" for name in rule}
    assert made["best_step"] == 4
    assert any(not torch.equal(tensors[f"rule.{name}"], rule[name]) for name in rule)
    arguments = ["--run", str(path), "--overwrite", "--evaluate.methods", "static", "gated@fomaml"]
    assert main(["evaluate", *arguments]) == 0


def test_a_start_that_is_missing_or_broken_is_one_line(copy, capsys):
    _, path = copy
    before = files(path)
    arguments = ["evaluate", "--run", path, "--overwrite", "--evaluate.methods", "static", "gated@maml"]
    fails(capsys, arguments, "starts/maml.safetensors", "run `dynlm learn-start`")
    assert files(path) == before
    write_tensors(Run(path).start("maml"), {"embedding.weight": torch.zeros(2, 2)}, {"config": {}, "best_step": 0})
    fails(capsys, arguments, "maml.safetensors lacks the tensor", "learn it again")
    shutil.copy(Run(path).prior, Run(path).start("maml"))  # the same names and shapes
    fails(capsys, arguments, "starts/maml.safetensors lacks 'best_step', 'config'")
    fails(capsys, ["learn-start", "--run", path, "--start.rule", "nope", *SHORT], "rules/nope", "does not exist")


def test_a_plan_needs_nothing_on_disk(tmp_path, capsys):
    small = ["--model.embedding-size", "16", "--model.hidden-size", "16", "--tokenizer.vocab-size", "300"]
    for kind in ("replay", "unroll"):
        arguments = ["plan", "--run", str(tmp_path / "run"), *small, "--meta.estimator.kind", kind]
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert "peak memory" in out
        assert "s a meta-step" in out
        fails(capsys, [*arguments, "--plan.memory", "10"], "MiB, the limit is 10", "does not fit")
    assert not (tmp_path / "run").exists()
