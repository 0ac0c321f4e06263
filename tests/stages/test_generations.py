"""One generation of a run: nothing foreign is touched, nothing is mixed, what differs or is unfinished is said."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from dynlm.claim import claim
from dynlm.cli.main import main
from dynlm.files import read_tensors, write_tensors
from dynlm.meta import outer
from dynlm.meta import train as meta_train
from dynlm.models import train as base_train
from dynlm.models.causal import load_model
from dynlm.runs import Run
from dynlm.session import api
from dynlm.stages import evaluate as evaluation
from dynlm.stages.recipe import load_recipe
from support.commands import fails, files

pytestmark = pytest.mark.usefixtures("plain_reports")

MORE = ["--meta.steps", "4", "--meta.validate-every", "1", "--meta.patience", "9"]


def mortal(function, number):
    """``function``, which works so many times; then the command ends within it."""
    life = iter(range(number))

    def wrapper(*arguments, **more):
        return 1 / 0 if next(life, None) is None else function(*arguments, **more)

    return wrapper


def dies(arguments):
    with pytest.raises(ZeroDivisionError):
        main(arguments)


# what is not dynlm's


def test_a_folder_of_others_is_never_begun(finished, tmp_path, capsys):
    recipe, _ = finished
    for name in ("figures/fig1.pdf", "rules/notes.txt", "evaluate/x", "report.html", "train.jsonl"):
        (tmp_path / "paper" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "paper" / name).write_text("mine")
    before = files(tmp_path / "paper")
    for command in (["train", recipe], ["learn-optimizer", recipe], ["few-shot", recipe], ["demo"]):
        flags = ["--run", tmp_path / "paper", "--overwrite"]
        fails(capsys, [*command, *flags], "is no run of dynlm and holds other")
    fails(capsys, ["train", recipe, "--run", ""], "give the name of a directory")
    fails(capsys, ["train", recipe, "--run", "a\0b"], "expected text without NUL")
    assert files(tmp_path / "paper") == before


def test_what_others_put_beside_the_runs_files_stays(copy):
    recipe, run = copy
    mine = [run / "rules" / "notes.txt", run / "figures" / "fig1.pdf", run / "evaluate" / "mine.json", run / "notes"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (run / "figures" / "gain.png").write_text("dynlm's")
    assert main(["train", str(recipe), "--run", str(run), "--overwrite"]) == 0
    assert [path.read_text() for path in mine] == ["mine"] * 4
    left = {path.relative_to(run).parts[0] for path in files(run)}
    written = {"model", "tokenizer", "recipe.json", "provenance.json", "train.jsonl"}
    assert left == written | {"rules", "figures", "evaluate", "notes"}
    assert {path.name for path in files(run / "rules")} == {"notes.txt"}
    assert {path.name for path in files(run / "figures")} == {"fig1.pdf"}


@pytest.mark.parametrize("setting", ["data.source", "tokenizer.name", "model.pretrained"])
def test_what_is_read_must_not_lie_where_files_are_replaced(copy, capsys, setting):
    recipe, run = copy
    name = {"data.source": "train.jsonl", "tokenizer.name": "tokenizer", "model.pretrained": "model"}[setting]
    before = files(run)
    flags = ["--run", run, "--overwrite", f"--{setting}", run / name]
    fails(capsys, ["train", recipe, *flags], f"{setting} is", "lies in the run directory")
    assert files(run) == before


# what differs


def change_texts(recipe, run):
    path = recipe.with_name("docs.jsonl")
    path.write_text(path.read_text().replace("the", "The"))


def change_tokenizer(recipe, run):
    shutil.copy(run / "tokenizer" / "sentencepiece.model", run / "x")
    data = (run / "x").read_bytes()
    (run / "tokenizer" / "sentencepiece.model").write_bytes(data.replace(b"the", b"eht", 1))
    (run / "x").unlink()


def change_model(recipe, run):
    model = load_model(run / "model")
    model.lm_head.bias.data[3] += 1
    model.save_pretrained(run / "model")


@pytest.fixture
def own(copy, tmp_path):
    """A copy of the finished run with its own copy of the texts."""
    recipe, run = copy
    for path in (recipe, recipe.with_name("docs.jsonl")):
        shutil.copy(path, tmp_path / path.name)
    for path in (tmp_path / recipe.name, run / "recipe.json"):
        path.write_text(path.read_text().replace(str(recipe.parent), str(tmp_path)))
    return tmp_path / recipe.name, run


@pytest.mark.parametrize(
    ("change", "what"), [(change_texts, "data"), (change_tokenizer, "tokenizer"), (change_model, "model")]
)
def test_each_stage_says_what_differs(own, capsys, change, what):
    recipe, run = own
    change(recipe, run)
    before = files(run)
    commands = ["tune", "meta-train", "evaluate", "audit", "learn-start"]
    for command in commands:
        more = ["--overwrite"] if command != "audit" else []
        fails(capsys, [command, recipe, "--run", run, *more], f"the {what} differs: ", "has the fingerprint", "with")
    if what != "data":
        text = recipe.with_name("a.txt")
        text.write_text("The cat sat on the mat .\n")
        fails(capsys, ["read", text, "--run", run], f"the {what} differs: ")
    assert files(run) == before


@pytest.mark.parametrize("name", ["rules/rms.safetensors", "rules/gated.safetensors", "prior.safetensors"])
def test_rules_and_priors_of_another_model_are_refused(copy, capsys, name):
    _, run = copy
    tensors, meta = read_tensors(run / name)
    meta.get("made", meta)["model"] = "0" * 16
    write_tensors(run / name, tensors, meta)
    text = run.parent / "a.txt"
    text.write_text("The cat sat on the mat .\n")
    rule = ["--rule", "rms"] if name == "rules/rms.safetensors" else []
    if name == "prior.safetensors":
        fails(capsys, ["read", text, "--run", run, *rule], "belongs to another model")
        assert main(["evaluate", "--run", str(run), "--overwrite"]) == 0  # which measures it again
        assert read_tensors(run / name)[1]["model"] != "0" * 16
        return
    for command in (["read", text, *rule], ["evaluate", "--overwrite"]):
        fails(capsys, [*command, "--run", run], f"{name} was made with the base model {'0' * 16}, this run holds")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda values: values.clear(), "has no schema number"),
        (lambda values: values.pop("dynlm"), "has no schema number"),
        (lambda values: values["dynlm"].update(schema=9), "has schema 9, this version of dynlm reads 1"),
        (lambda values: values.pop("data"), "lacks data.source"),
        (lambda values: values["read"].pop("segment"), "lacks read.segment"),
    ],
)
def test_a_recipe_that_is_not_whole_is_refused(copy, capsys, change, part):
    _, run = copy
    values = json.loads(Run(run).recipe.read_text())
    change(values)
    Run(run).recipe.write_text(json.dumps(values))
    before = files(run)
    fails(capsys, ["evaluate", "--run", run, "--overwrite"], part)
    assert files(run) == before


# what is unfinished


def test_a_base_model_that_is_unfinished_says_so(finished, tmp_path, capsys, monkeypatch):
    recipe, _ = finished
    run = Run(tmp_path / "run")
    arguments = ["train", str(recipe), "--run", str(run.path), "--train.validations-per-epoch", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(base_train._Trainer, "_step", mortal(base_train._Trainer._step, 200))
        dies(arguments)
    assert json.loads(run.recipe.read_text())["dynlm"]["finished"] is False
    fails(capsys, arguments, "holds unfinished work: add --resume to go on, or --overwrite")
    assert main(["tune", "--run", str(run.path), "--tune.rules", "rms", "--tune.trials", "1"]) == 0
    assert f"note: {run.model} is unfinished" in capsys.readouterr().out


def test_a_finished_model_stays_until_the_next_one_is_finished(copy, capsys, monkeypatch):
    recipe, run = copy
    before = files(run)
    more = ["--train.validations-per-epoch", "4", "--train.seed", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(base_train._Trainer, "_step", mortal(base_train._Trainer._step, 200))
        dies(["train", str(recipe), "--run", str(run), "--overwrite", *more])
    now = files(run)
    assert {path: now[path] for path in before} == before
    assert {path.relative_to(run).parts[0] for path in set(now) - set(before)} == {"checkpoints"}
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run), "--overwrite", "--evaluate.methods", "static"]) == 0
    assert "is being trained again" in capsys.readouterr().out
    assert main(["train", "--run", str(run), "--resume"]) == 0  # with the settings that it was begun with
    whole = run.parent / "whole"
    assert main(["train", str(recipe), "--run", str(whole), *more]) == 0
    names = [path.relative_to(whole) for path in files(whole)]
    assert sorted(path.relative_to(run) for path in files(run)) == sorted(names)
    for name in names:
        if name.name not in ("train.jsonl", "recipe.json", "provenance.json"):  # these hold seconds, and the run's name
            assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_a_trained_rule_stays_until_the_next_one_is_finished(copy, capsys, monkeypatch):
    recipe, run = copy
    path, arguments = Run(run).rule("gated"), ["meta-train", str(recipe), "--run", str(run), *MORE]
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(meta_train.MetaTrainer, "step", mortal(meta_train.MetaTrainer.step, 2))
        dies([*arguments, "--overwrite"])
    assert path.read_bytes() == before
    fails(capsys, arguments, "holds unfinished work: add --resume")
    assert main([*arguments, "--resume"]) == 0
    resumed, made = read_tensors(path)
    log = [{**json.loads(line), "seconds": 0} for line in Run(run).log("meta-train").read_text().splitlines()]
    assert made["made"]["finished"] is True
    assert main([*arguments, "--overwrite"]) == 0
    whole = read_tensors(path)[0]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    lines = Run(run).log("meta-train").read_text().splitlines()
    assert [{**json.loads(line), "seconds": 0} for line in lines] == log
    fails(capsys, [*arguments, "--resume"], "exists and nothing is left to resume")


def test_an_unfinished_rule_says_so_and_an_old_checkpoint_is_not_taken_up(copy, capsys, monkeypatch):
    recipe, run = copy
    path, arguments = Run(run).rule("gated"), ["meta-train", str(recipe), "--run", str(run), *MORE]
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(meta_train.MetaTrainer, "step", mortal(meta_train.MetaTrainer.step, 2))
        dies(arguments)
        assert read_tensors(path)[1]["made"]["finished"] is False
        first = path.read_bytes()
        patch.setattr(api, "read_articles", mortal(api.read_articles, 0))
        dies([*arguments, "--overwrite"])
    assert path.read_bytes() == first
    fails(capsys, [*arguments, "--resume"], "nothing is left to resume: add --overwrite")
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run), "--overwrite", "--evaluate.methods", "static", "gated"]) == 0
    assert f"note: {path} is unfinished" in capsys.readouterr().out
    text = run.parent / "a.txt"
    text.write_text("The cat sat on the mat .\n")
    assert main(["read", str(text), "--run", str(run)]) == 0
    assert f"note: {path} is unfinished" in capsys.readouterr().err


# --resume


def test_tuned_rules_are_kept(copy, capsys):
    recipe, run = copy
    arguments = ["tune", str(recipe), "--run", str(run)]
    before = Run(run).rule("rms").read_bytes()
    Run(run).rule("sgd").unlink()
    fails(capsys, arguments, "rules/rms.safetensors exists")
    assert main([*arguments, "--resume"]) == 0
    assert "rms: kept as it was tuned before" in capsys.readouterr().out
    assert Run(run).rule("rms").read_bytes() == before
    assert Run(run).rule("sgd").exists()
    fails(
        capsys,
        [*arguments, "--resume", "--tune.trials", "2"],
        "rules/rms.safetensors was made with another config",
        "--overwrite",
    )
    assert main([*arguments, "--resume", "--overwrite", "--tune.trials", "2"]) == 0
    assert read_tensors(Run(run).rule("rms"))[1]["made"]["trials"] == 2


def without_times(path):
    values = json.loads(path.read_text())
    for method in values["methods"].values():
        del method["tokens_per_s"]
    return values


def test_methods_that_were_read_are_kept_and_an_evaluation_is_replaced_when_all_are(copy, capsys, monkeypatch):
    _, run = copy
    arguments = ["evaluate", "--run", str(run)]
    assert main([*arguments, "--overwrite"]) == 0
    before, results, losses = files(run), without_times(Run(run).results), read_tensors(Run(run).losses)[0]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "read_method", mortal(evaluation.read_method, 2))
        dies([*arguments, "--overwrite"])
    assert {path: data for path, data in files(run).items() if path in before} == before
    fails(capsys, arguments, "holds unfinished work: add --resume")
    assert main([*arguments, "--resume"]) == 0
    out = capsys.readouterr().out
    assert [f"{name}: kept as it was read before" in out for name in ("static", "sgd", "rms")] == [True, True, False]
    assert without_times(Run(run).results) == results
    again = read_tensors(Run(run).losses)[0]
    assert all(torch.equal(again[name], losses[name]) for name in losses)
    assert set(files(run)) == set(before)


def test_a_finished_evaluation_is_kept_and_its_report_is_written(copy, capsys):
    _, run = copy
    arguments = ["evaluate", "--run", str(run)]
    assert main(["report", "--run", str(run)]) == 0
    before, page = Run(run).results.read_bytes(), Run(run).report.read_text()
    Run(run).report.unlink()
    fails(capsys, arguments, "is finished, its report is not: run `dynlm report`")
    fails(capsys, [*arguments, "--resume", "--evaluate.max-articles", "1"], "was made with other methods or settings")
    assert main([*arguments, "--resume"]) == 0
    assert Run(run).results.read_bytes() == before
    assert Run(run).report.read_text() == page


@pytest.mark.parametrize("more", [(), ("--start.outer.phi-lr", "1e-2")])
def test_learning_a_start_goes_on_bitwise(copy, capsys, monkeypatch, more):
    _, run = copy
    sizes = ["--start.segments", "4", "--start.outer.steps", "4", "--start.outer.tasks", "1"]
    arguments = ["learn-start", "--run", str(run), *sizes, "--start.outer.validate-every", "1", *more]
    assert main(arguments) == 0
    path = Run(run).start("fomaml")
    tensors, made = read_tensors(path)
    assert main([*arguments, "--resume"]) == 0
    assert "kept as it was learned before" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(outer, "_outer_step", mortal(outer._outer_step, 2))
        dies([*arguments, "--overwrite"])
    fails(capsys, arguments, "holds unfinished work: add --resume")
    assert main([*arguments, "--resume"]) == 0
    again, made_again = read_tensors(path)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert {**made_again, "seconds": 0} == {**made, "seconds": 0}
    assert not Run(run).checkpoint("learn-start-fomaml").exists()


# one command at a time, one demo


def test_two_commands_in_one_run_are_refused(copy, capsys):
    recipe, run = copy
    before = files(run)
    with claim(Run(run)):
        lock = files(run)
        for command in ("train", "tune", "meta-train", "learn-start", "evaluate", "report", "audit", "few-shot"):
            message = fails(capsys, [command, recipe, "--run", run, "--resume" if command == "train" else "--quiet"])
            assert f"another dynlm works in {run} (process {os.getpid()})" in message
        assert files(run) == lock
    assert files(run) == before


def test_an_interrupted_demo_is_made_again(finished, tmp_path, capsys, monkeypatch):
    run = Run(tmp_path / "demo")
    small = replace(load_recipe(finished[0]), run=str(run.path))
    small = replace(small, train=replace(small.train, validations_per_epoch=4))
    monkeypatch.setattr("dynlm.cli.main.parse", lambda name, arguments: small)
    with monkeypatch.context() as patch:
        patch.setattr(base_train._Trainer, "_step", mortal(base_train._Trainer._step, 200))
        dies(["demo"])
    assert run.demo.exists()
    assert json.loads(run.recipe.read_text())["dynlm"]["finished"] is False
    assert main(["demo"]) == 0
    assert "is an earlier run of the demo: it is replaced" in capsys.readouterr().out
    assert run.demo.exists()
    assert run.report.exists()
    with monkeypatch.context() as patch:
        patch.setattr(base_train._Trainer, "_step", mortal(base_train._Trainer._step, 2))
        dies(["demo"])
    assert main(["demo"]) == 0
    assert run.demo.exists()
