"""The command few-shot: its files, its refusals, and that a learned start is worth something."""

import json

import pytest

from dynlm.cli.main import main
from dynlm.files import read_tensors
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.labs.fewshot.evaluate import adapted, mean_loss, mean_over_tasks
from dynlm.labs.fewshot.nets import MLP, NetScorer, seeded, squared_error
from dynlm.labs.fewshot.tasks import Sinusoids
from dynlm.labs.fewshot.trial import METHODS, Trial, tasks_of
from dynlm.models.params import adapted_parameters
from dynlm.optim.handmade import SGD
from dynlm.priors import make_priors
from dynlm.runs import Run

RECIPE = """
[fewshot]
width = 8
inner_steps = 2
proximal_steps = 3
reptile_steps = 3
test_steps = 3
rates = [0.01, 0.02, 0.04]
valid_tasks = 4
test_tasks = 6
[fewshot.tasks]
queries = 8
[fewshot.outer]
steps = 3
tasks = 2
validate_every = 2
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few-shot")
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE)
    assert main(["few-shot", str(recipe), "--run", str(folder / "run")]) == 0
    return recipe, Run(folder / "run")


def test_every_method_has_its_figures(finished):
    results = json.loads(finished[1].few_shot.read_text())
    assert list(results["methods"]) == list(METHODS)
    for result in results["methods"].values():
        low, high = result["error_ci95"]
        assert low <= result["error"] <= high
        assert result["lr"] in (0.01, 0.02, 0.04)
        parts = result["cpu_seconds"]
        assert parts["total"] == pytest.approx(parts["train"] + parts["tune"] + parts["test"])
        assert min(parts.values()) > 0
    assert results["fewshot"]["width"] == 8
    assert results["methods"]["maml"]["error"] != results["methods"]["joint"]["error"]


def test_the_learned_start_gives_the_reported_error(finished):
    """From the files alone: start, rate and test tasks."""
    run = finished[1]
    result = json.loads(run.few_shot.read_text())["methods"]["fomaml"]
    tensors, meta = read_tensors(run.few_shot_start("fomaml"))
    net = seeded(lambda: MLP((1, 8, 8, 1)), 3)
    parameters = adapted_parameters(net)
    priors = make_priors(parameters, [a.matrix_RC.abs() for a in parameters])
    priors = [p._replace(theta0=tensors[p.name]) for p in priors]
    config = ReadConfig(kernel="eager", trust=0)
    reader = InnerLoop(net, NetScorer(net, squared_error), SGD(meta["result"]["lr"]), priors, config)
    values = adapted(reader, tasks_of(Sinusoids(10, 8), 6, seed=3), 3, mean_loss)
    assert mean_over_tasks(values).value == pytest.approx(result["error"], rel=1e-5)


def test_a_run_repeats_itself_and_nothing_is_replaced_unasked(finished, capsys):
    recipe, run = finished
    before = json.loads(run.few_shot.read_text())
    assert main(["few-shot", str(recipe), "--run", str(run.path)]) == 2
    assert "add --overwrite to replace it" in capsys.readouterr().err.strip().split("\n")[-1]
    assert main(["few-shot", str(recipe), "--run", str(run.path), "--overwrite"]) == 0
    after = json.loads(run.few_shot.read_text())
    for name, result in before["methods"].items():
        assert {**result, "cpu_seconds": 0} == {**after["methods"][name], "cpu_seconds": 0}


def test_resume_takes_over_what_was_finished_under_the_same_settings(finished, tmp_path, capsys):
    recipe = str(finished[0])
    flags = ["few-shot", recipe, "--run", str(tmp_path)]
    assert main([*flags, "--fewshot.methods", "joint", "fomaml"]) == 0
    first = json.loads(Run(tmp_path).few_shot.read_text())["methods"]
    assert main([*flags, "--fewshot.methods", "fomaml", "reptile", "--resume", "--fewshot.reptile-batch", "5"]) == 0
    second = json.loads(Run(tmp_path).few_shot.read_text())["methods"]
    assert list(second) == ["fomaml", "reptile"]
    assert second["fomaml"] == first["fomaml"], "the very same seconds: nothing was trained again"
    other = [*flags, "--fewshot.methods", "fomaml", "--resume", "--fewshot.inner-lr", "0.03"]
    assert main(other) == 2
    assert "was made with other settings: add --overwrite too" in capsys.readouterr().err
    assert json.loads(Run(tmp_path).few_shot.read_text())["methods"] == second
    assert main([*other, "--overwrite"]) == 0
    third = json.loads(Run(tmp_path).few_shot.read_text())["methods"]
    assert third["fomaml"]["error"] != first["fomaml"]["error"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("--fewshot.methods", "joint", "mamal"), "unknown 'mamal': choose from joint"),
        (("--fewshot.rates", "1e30"), "not finite at any of the rates"),
        (("--fewshot.tasks.kind", "characters", "--fewshot.tasks.ways", "900"), "lower ways (--fewshot.tasks.ways)"),
        (("--fewshot.inner-lr", "1e20", "--fewshot.methods", "maml"), "lower its lr"),
    ],
)
def test_what_cannot_be_is_one_line(finished, tmp_path, capsys, flags, part):
    assert main(["few-shot", str(finished[0]), "--run", str(tmp_path / "run"), *flags]) == 2
    assert part in capsys.readouterr().err.strip().split("\n")[-1]
    assert not (tmp_path / "run" / "few-shot.json").exists()


def test_characters_run_too(finished, tmp_path, capsys):
    flags = "--fewshot.tasks.kind characters --fewshot.tasks.shots 1 --fewshot.tasks.queries 2 --fewshot.tasks.side 16"
    few = "--fewshot.methods joint imaml --fewshot.width 4 --fewshot.tasks.variants 1"
    assert main(["few-shot", str(finished[0]), "--run", str(tmp_path), *flags.split(), *few.split()]) == 0
    assert "accuracy" in capsys.readouterr().out
    results = json.loads(Run(tmp_path).few_shot.read_text())["methods"]
    assert all(0 <= result["error"] <= 1 for result in results.values())


def test_an_interrupted_comparison_keeps_what_is_finished_and_the_earlier_one(finished, tmp_path, capsys, monkeypatch):
    recipe, run = str(finished[0]), Run(tmp_path)
    flags = ["few-shot", recipe, "--run", str(tmp_path), "--fewshot.methods"]
    assert main([*flags, "joint"]) == 0
    before = run.few_shot.read_bytes(), run.few_shot_start("joint").read_bytes()
    train = Trial.train

    def interrupted(self, outer):
        if self.name == "fomaml":
            raise KeyboardInterrupt
        return train(self, outer)

    more = ["joint", "fomaml", "--fewshot.inner-lr", "0.03"]
    with monkeypatch.context() as patch:
        patch.setattr(Trial, "train", interrupted)
        assert main([*flags, *more, "--overwrite"]) == 130
    assert (run.few_shot.read_bytes(), run.few_shot_start("joint").read_bytes()) == before
    capsys.readouterr()
    assert main([*flags, *more]) == 2
    assert "holds unfinished work: add --resume" in capsys.readouterr().err
    assert main([*flags, *more, "--resume"]) == 0
    results = json.loads(run.few_shot.read_text())
    assert list(results["methods"]) == ["joint", "fomaml"]
    assert results["fewshot"]["inner_lr"] == 0.03
    assert read_tensors(run.few_shot_start("joint"))[1]["settings"]["inner_lr"] == 0.03
    assert sorted(p.name for p in tmp_path.iterdir()) == ["few-shot", "few-shot.json", "provenance.json", "recipe.json"]
