"""``dynlm learn-optimizer``: a rule that loads, and what it says when it would overwrite one."""

import json

from dynlm.cli.main import main
from dynlm.labs.general.train import GeneralTrainer
from dynlm.optim.general import General
from dynlm.optim.library import load_rule
from dynlm.runs import Run


def make_command(tmp_path, steps):
    sizes = ["--general.steps", str(steps), "--general.pairs", "1", "--general.validation-tasks", "1"]
    lengths = ["--general.family.min-steps", "5", "--general.family.max-steps", "8"]
    family = ["--general.family.families", "linear", *lengths]
    return ["learn-optimizer", "--run", str(tmp_path / "run"), *sizes, *family]


def interrupt(trainer):
    raise KeyboardInterrupt


def test_it_leaves_a_rule_that_loads_and_does_not_replace_it_unasked(tmp_path, capsys):
    command = make_command(tmp_path, steps=1)
    assert main(command) == 0
    rule, made = load_rule(Run(tmp_path / "run").rule("general"))
    assert isinstance(rule, General)
    assert made["settings"]["family"]["families"] == ["linear"]
    assert made["best_meta_validation"] < 0
    before = Run(tmp_path / "run").rule("general").read_bytes()
    assert main(command) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert Run(tmp_path / "run").rule("general").read_bytes() == before
    assert main([*command, "--resume"]) == 2
    assert "exists and nothing is left to resume: add --overwrite" in capsys.readouterr().err
    assert Run(tmp_path / "run").rule("general").read_bytes() == before


def test_unfinished_work_is_gone_on_with_and_never_replaced_unasked(tmp_path, capsys, monkeypatch):
    command = make_command(tmp_path, steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(GeneralTrainer, "step", interrupt)
        assert main(command) != 0
    run = Run(tmp_path / "run")
    before = run.checkpoint("learn-optimizer").read_bytes()
    capsys.readouterr()
    assert main(command) == 2
    assert "add --resume to go on" in capsys.readouterr().err
    assert main([*command, "--resume", "--general.sigma", "0.3"]) == 2
    assert "other [general] settings" in capsys.readouterr().err
    assert run.checkpoint("learn-optimizer").read_bytes() == before
    assert main([*command, "--resume"]) == 0
    assert not run.checkpoint("learn-optimizer").exists()
    assert [json.loads(line)["step"] for line in run.log("learn-optimizer").read_text().splitlines()] == [0, 2]
    assert main([*command, "--overwrite"]) == 0
