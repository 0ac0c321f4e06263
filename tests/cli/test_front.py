"""The front of the command line: help, names, flags of every command, progress, threads, figures as JSON."""

import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import torch

import dynlm
from dynlm.cli.help import SECTIONS
from dynlm.cli.main import COMMANDS, main, parse
from dynlm.files import read_json
from dynlm.kept import FLAGS
from dynlm.models import train
from dynlm.progress import Bar, set_quiet
from dynlm.runs import Run
from dynlm.stages.recipe import Recipe, find_recipe, load_recipe, shipped_recipes
from dynlm.threads import choose_threads
from dynlm.types import InputError
from support.commands import fails, files

pytestmark = pytest.mark.usefixtures("plain_reports")

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "read"])
def test_help_of_a_command_is_one_screen_of_its_own_settings(command, capsys):
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 80
    assert f"usage: dynlm {command} [RECIPE]" in lines[0]
    shown = set(re.findall(r"^  --(\w+)\.", "\n".join(lines), re.MULTILINE))
    assert shown == set(SECTIONS[command])
    for flag in FLAGS:
        assert any(line.startswith(f"  --{flag.replace('_', '-')} ") for line in lines)
    assert main(["help", command]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_every_section_belongs_to_a_command():
    sections = {name for names in SECTIONS.values() for name in names}
    assert sections == set(vars(Recipe())) - {"run", *FLAGS}


def test_version_module_and_environment(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dynlm {dynlm.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "dynlm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"dynlm {dynlm.__version__}\n"
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    assert {"python", "platform", "cores", "threads", "compiler", "transformers"} <= set(found)


def test_recipes_that_ship_go_by_name(capsys):
    assert set(shipped_recipes()) == {path.stem for path in (ROOT / "recipes").glob("*.toml")}
    assert load_recipe(find_recipe("wikitext2-cpu")) == load_recipe(ROOT / "recipes" / "wikitext2-cpu.toml")
    fails(capsys, ["train", "wikitext3"], "recipe wikitext3 does not exist", "wikitext2-cpu")


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_no_settings_of_a_recipe(tmp_path, name):
    (tmp_path / "r.toml").write_text(f"{name} = true\n" if name != "threads" else "threads = 2\n")
    with pytest.raises(InputError, match=f"'{name}' is no setting of a recipe: give --{name.replace('_', '-')}"):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("form", ["--run {}", "--run={}"])
def test_settings_of_a_run_are_taken_however_the_flag_is_written(copy, form):
    _, run = copy
    values = json.loads(Run(run).recipe.read_text())
    values["read"]["segment"] = 8
    Run(run).recipe.write_text(json.dumps(values))
    recipe = parse("evaluate", form.format(run).split())
    assert (recipe.run, recipe.read.segment, recipe.tokenizer.vocab_size) == (str(run), 8, 400)


def test_a_runs_recipe_keeps_no_flag_of_a_call(finished):
    assert not set(FLAGS) & set(read_json(Run(finished[1]).recipe))


@pytest.mark.parametrize(
    "command", [name for name, command in COMMANDS.items() if not command.resumes and name != "read"]
)
def test_resuming_is_refused_where_nothing_resumes_and_nothing_is_replaced(copy, command, capsys):
    _, run = copy
    before = files(run)
    fails(capsys, [command, "--run", run, "--resume"], "has nothing to resume")
    assert files(run) == before


def test_the_demo_replaces_no_run_but_its_own(copy, capsys):
    recipe, run = copy
    before = files(run)
    fails(capsys, ["demo", "--run", run], "is no run of the demo: choose another --run")
    fails(capsys, ["demo", f"--run={run}"], "is no run of the demo")
    assert files(run) == before
    Run(run).demo.write_text("made by the demo")
    assert main(["train", str(recipe), "--run", str(run), "--overwrite"]) == 0
    assert not Run(run).demo.exists()  # it is the user's own from now on


def test_figures_as_one_json_object(copy, capsys):
    recipe, run = copy
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run), "--overwrite", "--json", "--evaluate.methods", "static", "rms"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    saved = json.loads(Run(run).results.read_text())["methods"]["rms"]
    assert found["methods"]["rms"]["bits_per_byte"] == saved["bits_per_byte"]
    assert (found["command"], found["run"], found["articles"]) == ("evaluate", str(run), 3)
    assert "bits/byte" in err
    small = ["--tune.rules", "rms", "--tune.trials", "2", "--overwrite", "--json"]
    assert main(["tune", str(recipe), "--run", str(run), *small]) == 0
    assert set(json.loads(capsys.readouterr().out)["rules"]["rms"]) == {"nats_per_token", "settings"}


def test_methods_are_those_that_the_run_holds(copy, capsys):
    _, run = copy
    values = json.loads(Run(run).recipe.read_text())
    values["evaluate"]["methods"] = []
    Run(run).recipe.write_text(json.dumps(values))
    Run(run).rule("sgd").unlink()
    Run(run).results.unlink()
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run)]) == 0
    assert "note: this run has no sgd (`dynlm tune`), adam (`dynlm tune`)" in capsys.readouterr().out
    assert set(json.loads(Run(run).results.read_text())["methods"]) == {"static", "stateless", "rms", "gated"}
    fails(capsys, ["evaluate", "--run", run, "--overwrite", "--evaluate.methods", "static", "adam"], "rules/adam")
    fails(capsys, ["evaluate", "--run", run, "--overwrite", "--evaluate.methods", "static", "static"], "twice")


# progress


def test_progress_in_a_file_is_a_few_lines(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dynlm.progress.time.perf_counter", lambda: now[0])
    with Bar(1000, "train") as bar:
        for step in range(1000):
            now[0] += 1.0
            bar.set_postfix_str(f"loss {step}")
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert 7 <= len(lines) <= 9
    assert lines[0].startswith("train: 125 of 1,000 steps, 125 s, 1 steps/s, loss 124")
    with Bar(10, "quick") as bar:
        bar.update(10)
    with Bar(0, "endless", "token") as bar:
        for _ in range(10_000):
            now[0] += 1.0
            bar.update(100)
    assert len(capsys.readouterr().err.splitlines()) <= 14


def test_quiet_shows_no_progress(capsys, monkeypatch):
    now = iter(range(0, 10**6, 100))
    monkeypatch.setattr("dynlm.progress.time.perf_counter", lambda: float(next(now)))
    set_quiet(True)
    try:
        with Bar(10, "train") as bar:
            bar.update(5)
            bar.write("a line")
    finally:
        set_quiet(False)
    assert capsys.readouterr() == ("", "")


# threads


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("dynlm.threads.os.cpu_count", lambda: 2)
    torch.set_num_threads(2)


@pytest.mark.parametrize(("slower", "expected"), [(0.5, 1), (1.0, 1), (1.9, 2)])
def test_threads_are_chosen_by_what_is_measured(two_threads, monkeypatch, slower, expected):
    monkeypatch.setattr("dynlm.threads._measure", lambda product, numbers: {1: 1.0, 2: 1.0 / slower})
    chosen = choose_threads(0, 10**9)
    assert (chosen.number, torch.get_num_threads()) == (expected, expected)
    assert f"measured {slower:.2f}" in chosen.reason


def test_small_models_take_one_thread_and_a_wish_is_granted(two_threads, monkeypatch):
    assert choose_threads(0, 1_600_000) == (1, "the model is small")
    assert choose_threads(2, 1_600_000) == (2, "--threads")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert choose_threads(0, 1_600_000) == (2, "OMP_NUM_THREADS")


def test_the_measurement_times_both(two_threads):
    chosen = choose_threads(0, product=(64, 64, 64))
    assert chosen.number in (1, 2)
    assert "measured" in chosen.reason


# Ctrl-C


INTERRUPTED = """
import os, signal, sys
from dynlm.models import train
from dynlm.cli.main import main

step, count = train._Trainer._step, 0
def counted(self, window):
    global count
    count += 1
    if count == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, window)
train._Trainer._step = counted
sys.exit(main(sys.argv[2:]))
"""


def in_a_process(arguments, at):
    """(exit code, standard error) of a command that gets Ctrl-C at a step of training."""
    command = [sys.executable, "-c", INTERRUPTED, str(at), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stderr


@pytest.fixture
def here(monkeypatch, capsys):
    def interrupted(arguments, at, number):
        """The same in this process, with any signal."""
        step, count = train._Trainer._step, itertools.count(1)

        def counted(self, window):
            if next(count) == at:
                signal.raise_signal(number)
            return step(self, window)

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(train._Trainer, "_step", counted)
            code = main(arguments)
        return code, capsys.readouterr().err

    return interrupted


def test_a_signal_leaves_a_checkpoint_that_goes_on_bitwise_or_promises_none(finished, tmp_path, here):
    recipe, _ = finished
    training = ["train", str(recipe), "--train.validations-per-epoch", "4", "--run"]
    assert main([*training, str(tmp_path / "whole")]) == 0
    whole = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    steps = json.loads((tmp_path / "whole" / "train.jsonl").read_text().splitlines()[-1])["step"]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        run = tmp_path / number.name
        arguments = [*training, str(run)]
        found, said = here(arguments, 2, number)
        assert found == code
        assert "interrupted before the first validation: nothing was saved" in said
        assert not run.exists()
        late = steps - 2
        found, said = in_a_process(arguments, late) if code == 130 else here(arguments, late, number)
        assert found == code
        assert f"interrupted after step {late}, which is saved: --resume goes on from there" in said
        assert main(["train", "--run", str(run), "--resume"]) == 0
        assert (run / "model" / "model.safetensors").read_bytes() == whole


def test_the_log_of_a_run_in_a_file_is_short(copy):
    """No redrawn bars, no bars of libraries: what a newcomer's log of the demo is made of."""
    _, run = copy
    command = [sys.executable, "-m", "dynlm", "evaluate", "--run", str(run), "--overwrite"]
    command += ["--evaluate.methods", "static", "rms"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) < 15
    assert not any("\r" in line or "%|" in line for line in lines)


def test_an_error_ends_with_the_flag_that_its_command_has(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "no column of the name text"}\n')
    fails(capsys, ["train", "--run", tmp_path / "run", "--data.source", rows], "(--data.text-column)")
    assert main(["read", str(rows)]) == 2
    assert "--" not in capsys.readouterr().err  # it has none for a column
