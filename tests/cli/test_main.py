"""The command line on real text: the whole chain once, and one clear line for everything that is wrong."""

import json
import re
from pathlib import Path

import pytest

from chain import STEPS
from dynlm.cli.main import COMMANDS, main
from dynlm.files import read_tensors, write_json
from dynlm.kept import saved_settings
from dynlm.runs import Run
from dynlm.stages.recipe import Recipe, load_recipe, recipe_of_run
from dynlm.stamps import Stamp
from dynlm.types import InputError
from support.commands import fails, files

pytestmark = pytest.mark.usefixtures("plain_reports")

RECIPES = sorted(Path(__file__).parents[2].glob("recipes/*.toml"))


def test_the_chain_leaves_results_losses_and_a_report(finished):
    run = Run(finished[1])
    results = json.loads(run.results.read_text())
    assert set(results["methods"]) == {"static", "sgd", "rms", "gated"}
    assert results["articles"] == 3
    tensors, _ = read_tensors(run.losses)
    assert tensors["losses/gated"].numel() == results["tokens"]
    assert "gated" in run.report.read_text()
    assert not run.checkpoint("train").exists()
    assert recipe_of_run(run.recipe).tokenizer.vocab_size == 400


def test_learning_while_reading_gains_on_real_text(finished):
    methods = json.loads(Run(finished[1]).results.read_text())["methods"]
    assert methods["rms"]["nats"] < methods["static"]["nats"]


def test_a_rule_of_another_seed_stands_beside_the_first(copy, capsys):
    recipe, run = copy
    before = Run(run).rule("gated").read_bytes()
    more = ["--meta.steps", "2", "--meta.validate-every", "2", "--meta.seed", "1"]
    assert main(["meta-train", str(recipe), "--run", str(run), *more]) == 0
    assert Run(run).rule("gated").read_bytes() == before
    assert Run(run).log("meta-train-seed1").is_file()
    fails(capsys, ["meta-train", recipe, "--run", run, *more], "gated-seed1.safetensors exists", "--overwrite")
    methods = ["--evaluate.methods", "static", "gated", "gated#1"]
    assert main(["evaluate", str(recipe), "--run", str(run), "--overwrite", *methods]) == 0
    results = json.loads(Run(run).results.read_text())
    assert results["seeds"]["gated"]["methods"] == ["gated", "gated#1"]
    assert "was learned from 2 seeds" in Run(run).report.read_text()
    fails(capsys, ["evaluate", recipe, "--run", run, "--overwrite", *methods[:2], "gated#7"], "run `dynlm meta-train`")


def test_a_run_is_taken_up_without_its_recipe_and_the_stream_setting_runs(copy, capsys):
    _, run = copy
    arguments = ["--run", str(run), "--overwrite", "--read.reset", "never", "--evaluate.methods", "static", "rms"]
    assert main(["evaluate", *arguments]) == 0
    results = json.loads(Run(run).results.read_text())
    assert results["reset"] == "never"
    assert set(results["methods"]) == {"static", "rms"}
    assert f"run directory: {run}" in capsys.readouterr().out


def test_evaluation_is_repeatable_bitwise(copy):
    _, run = copy
    first, _ = read_tensors(Run(run).losses)
    assert main(["evaluate", "--run", str(run), "--overwrite"]) == 0
    again, _ = read_tensors(Run(run).losses)
    assert all((first[name] == again[name]).all() for name in first)


@pytest.mark.parametrize("command", [*STEPS])
def test_nothing_finished_is_replaced_unasked(copy, capsys, command):
    recipe, run = copy
    before = files(run)
    fails(capsys, [command, recipe, "--run", run], "exists", "--overwrite")
    assert files(run) == before


def test_an_unknown_key_is_named_with_the_nearest_one(finished, tmp_path, capsys):
    recipe = tmp_path / "bad.toml"
    recipe.write_text("[train]\nepoch = 3\n")
    for command in STEPS:
        fails(capsys, [command, recipe], "unknown key 'epoch'", "did you mean 'epochs'")
    assert not list(tmp_path.glob("runs"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train = 3", "expected a [table]"),
        ("[train]\nepochs = 'many'", "'many': expected a whole number"),
        ("[read]\nreset = 'often'", "expected one of 'article', 'never'"),
        ("[evaluate]\nmethods = 'static'", "expected a list"),
        ("[train", "is not TOML"),
    ],
)
def test_recipes_are_checked(tmp_path, capsys, text, message):
    path = tmp_path / "r.toml"
    path.write_text(text)
    fails(capsys, ["train", path], message)


@pytest.mark.parametrize("command", ["train", *STEPS[1:], "report"])
def test_missing_files(tmp_path, capsys, command):
    fails(capsys, [command, tmp_path / "none.toml"], "does not exist")
    if command == "train":
        flags = ["--data.source", tmp_path / "none.txt"]
        fails(capsys, [command, "--run", tmp_path / "new", *flags], "file does not exist")
    else:
        fails(capsys, [command, "--run", tmp_path / "new"], "does not exist: run `dynlm")
    assert not (tmp_path / "new").exists()


def test_an_empty_corpus(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    flags = ["--run", tmp_path / "new", "--data.source", tmp_path / "empty.txt"]
    fails(capsys, ["train", *flags], "holds no article")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("model/model.safetensors", "evaluate"),
        ("model/model.safetensors", "tune"),
        ("model/model.safetensors", "meta-train"),
        ("rules/gated.safetensors", "evaluate"),
        ("rules/rms.safetensors", "meta-train"),
        ("prior.safetensors", "evaluate"),
        ("recipe.json", "evaluate"),
        ("tokenizer/sentencepiece.model", "tune"),
        ("evaluate/results.json", "report"),
        ("evaluate/losses.safetensors", "report"),
    ],
)
def test_truncated_files(copy, capsys, name, command):
    recipe, run = copy
    path = run / name
    path.write_bytes(path.read_bytes()[:-7] if path.suffix != ".model" else b"\x01")
    before = files(run)
    fails(capsys, [command, recipe, "--run", run, "--overwrite"], str(run))
    assert files(run) == before


def test_a_truncated_checkpoint(copy, capsys):
    recipe, run = copy
    for command in ("train", "meta-train"):
        checkpoint = Run(run).checkpoint(command)
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
        before = files(run)
        fails(capsys, [command, recipe, "--run", run], "holds unfinished work", "--resume")
        fails(capsys, [command, recipe, "--run", run, "--resume"], "truncated")
        assert files(run) == before


def test_a_nan_loss_in_every_stage(copy, capsys, monkeypatch):
    import torch

    from dynlm.models.causal import load_model

    recipe, run = copy
    model = load_model(Run(run).model)
    model.lm_head.bias.data[5] = float("nan")
    model.save_pretrained(Run(run).model)
    monkeypatch.setattr("dynlm.stamps.Stamp.require", lambda *_: None)  # or the model would be seen to be another one
    before = files(run)
    for command, message in (
        ("tune", "before any update: the model's weights or the text are broken"),
        ("meta-train", "loss is nan before any update"),
        ("evaluate", "loss is nan before any update"),
    ):
        fails(capsys, [command, recipe, "--run", run, "--overwrite"], message)
        assert {p: b for p, b in files(run).items() if p in before} == before
    fails(capsys, ["train", recipe, "--run", run, "--overwrite", "--train.lr", "1e30"], "training loss is", "train.lr")
    assert not torch.isfinite(load_model(Run(run).model).lm_head.bias[5])  # still the earlier model


def test_data_and_model_are_fixed_by_training(copy, capsys):
    recipe, run = copy
    arguments = ["tune", recipe, "--run", run, "--overwrite", "--model.hidden-size", "13"]
    fails(capsys, arguments, "model.hidden_size is 13", "was made with 12")


def test_evaluation_needs_static_and_existing_splits_and_rules(copy, capsys):
    _, run = copy
    base = ["evaluate", "--run", run, "--overwrite"]
    fails(capsys, [*base, "--evaluate.methods", "rms"], "lack 'static'")
    fails(capsys, [*base, "--evaluate.methods", "static", "adam"], "adam.safetensors does not exist: run `dynlm tune`")
    fails(capsys, [*base, "--evaluate.split", "dev"], "invalid choice 'dev'", "--evaluate.split")
    fails(capsys, [*base, "--read.params", "layer.*"], "matches no parameter", "did you mean")
    before = (run / "evaluate" / "results.json").read_bytes()
    fails(
        capsys, [*base, "--report.articles", "nope"], "article 'nope' was not read: did you mean", "(--report.articles)"
    )
    fails(capsys, [*base, "--format", "gif"], "format 'gif' is unknown")
    assert (run / "evaluate" / "results.json").read_bytes() == before


def test_unknown_commands_and_help(capsys):
    fails(capsys, ["learn"], "unknown command 'learn'")
    assert main(["--help"]) == 0
    assert "meta-train" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["train", "--help"]) == 0
    assert "passes over the train split" in capsys.readouterr().out
    fails(capsys, ["train", "--train.epoch", "3"], "--train.epoch", "--train.epochs")
    fails(capsys, ["train", "--train.epochs", "three"], "--train.epochs", "three")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_loads_and_differs_from_the_defaults(path):
    recipe = load_recipe(path)
    assert recipe != Recipe()
    commands = set(re.findall(rf"dynlm (\S+) +recipes/{path.name}", path.read_text()))
    assert commands
    assert commands <= set(COMMANDS)


def test_a_recipe_survives_its_run_directory(tmp_path):
    recipe = load_recipe(RECIPES[0])
    write_json(tmp_path / "recipe.json", Stamp().put_on(saved_settings(recipe)))
    assert recipe_of_run(tmp_path / "recipe.json") == recipe


def test_run_require_names_the_command(tmp_path):
    with pytest.raises(InputError, match="run `dynlm train` with this run directory first"):
        Run(tmp_path).require(Run(tmp_path).model, "train")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 68719476736 bytes. Error 12"
            ),
            "there is not enough memory (tried to allocate 68719476736 bytes): lower the sizes",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0"), "(Tried to allocate 20.00 GiB)"),
        (MemoryError(), "there is not enough memory: lower the sizes"),
    ],
)
def test_too_little_memory_is_one_line(error, said, capsys, monkeypatch, tmp_path):
    def short(*_):
        raise error

    monkeypatch.setattr("dynlm.stages.train.train", short)
    fails(capsys, ["train", "--run", tmp_path / "run"], said)


def test_other_errors_of_torch_are_shown_whole(monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("dynlm.stages.train.train", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", "--run", str(tmp_path / "run")])
