"""``dynlm learn-optimizer``: a rule that loads, and what it says when it would overwrite one."""

from dynlm.cli.main import main
from dynlm.optim.general import General
from dynlm.optim.library import load_rule
from dynlm.runs import Run


def test_it_leaves_a_rule_that_loads_and_does_not_replace_it_unasked(tmp_path, capsys):
    sizes = ["--general.steps", "1", "--general.pairs", "1", "--general.validation-tasks", "1"]
    family = [
        "--general.family.families",
        "linear",
        "--general.family.min-steps",
        "5",
        "--general.family.max-steps",
        "8",
    ]
    command = ["learn-optimizer", "--run", str(tmp_path / "run"), "--general.workers", "1", *sizes, *family]
    assert main(command) == 0
    rule, made = load_rule(Run(tmp_path / "run").rule("general"))
    assert isinstance(rule, General)
    assert made["settings"]["family"]["families"] == ["linear"]
    assert made["best_meta_validation"] < 0
    before = Run(tmp_path / "run").rule("general").read_bytes()
    assert main(command) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert Run(tmp_path / "run").rule("general").read_bytes() == before
    assert main([*command, "--resume", "--general.sigma", "0.3"]) == 2
    assert "other [general] settings" in capsys.readouterr().err
