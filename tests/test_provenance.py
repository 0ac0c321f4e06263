"""Each file of a run tells what made it, and no file tells what made another."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from dynlm import provenance
from dynlm.changes import changing
from dynlm.cli.main import main
from dynlm.kept import Call
from dynlm.provenance import command, load, record
from dynlm.runs import Run
from dynlm.types import InputError


def test_every_stage_of_the_chain_tells_what_made_its_files(finished):
    """Model, tokenizer, rules and results, each with its own command."""
    run = Run(finished[1])
    origins = load(run)
    made = {name: shlex.split(origin["command"])[:2] for name, origin in origins.items()}
    rules = {f"rules/{path.name}" for path in run.path.glob("rules/*")}
    assert set(made) == {"model", "tokenizer", "evaluate/results.json", *rules}
    assert made["model"] == made["tokenizer"] == ["dynlm", "train"]
    assert made["rules/rms.safetensors"] == ["dynlm", "tune"]
    assert made["rules/gated.safetensors"] == ["dynlm", "meta-train"]
    assert made["evaluate/results.json"] == ["dynlm", "evaluate"]
    origin = origins["model"]
    assert origin["settings"]["tokenizer.vocab_size"] == 400
    assert "train.seed" in origin["seeds"]
    assert origin["seconds"] > 0
    assert origin["versions"].keys() >= {"dynlm", "python", "torch", "transformers"}
    assert origin["hardware"]["cores"] >= 1


def test_the_report_shows_it(finished):
    page = Run(finished[1]).report.read_text()
    assert "dynlm meta-train" in page
    assert load(Run(finished[1]))["model"]["hardware"]["processor"] in page


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    write(run, "rules/a.safetensors", "rules/b.safetensors")
    return run


def write(run, *names):
    with changing(run.path) as new:
        for name in names:
            new.at(run.path / name).write_text(name)
        record(new, run, *(run.path / name for name in names))


def test_a_replaced_file_is_not_told_of_and_a_removed_one_is_forgotten(run):
    assert set(load(run)) == {"rules/a.safetensors", "rules/b.safetensors"}
    (run.path / "rules/a.safetensors").write_text("another")
    assert set(load(run)) == {"rules/b.safetensors"}
    (run.path / "rules/b.safetensors").unlink()
    write(run, "rules/c.safetensors")
    assert set(json.loads(run.provenance.read_text())["files"]) == {"rules/a.safetensors", "rules/c.safetensors"}


def test_a_python_program_is_told_by_its_command_line_and_has_no_settings(run):
    origin = load(run)["rules/a.safetensors"]
    assert Path(sys.orig_argv[0]).name in origin["command"]
    assert (origin["settings"], origin["seeds"], "seconds" in origin) == ({}, {}, False)
    assert origin["threads"] == torch.get_num_threads()


def test_a_command_tells_the_settings_that_differ(run):
    with command("dynlm tune --run x", Call(run="x", threads=3)):
        write(run, "rules/a.safetensors")
    origin = load(run)["rules/a.safetensors"]
    assert origin["command"] == "dynlm tune --run x"
    assert origin["settings"] == {"run": "x"}
    assert "seconds" in origin


@pytest.mark.parametrize("text", ["{", '{"schema": 7, "files": {}}', '{"schema": 1, "files": {"a": 1}}'])
def test_a_damaged_record_is_one_line_when_it_is_read_and_costs_no_work(run, text):
    run.provenance.write_text(text)
    with pytest.raises(InputError, match=r"provenance\.json"):
        load(run)
    write(run, "rules/a.safetensors")
    assert set(load(run)) == {"rules/a.safetensors"}


def test_names_outside_the_run_are_passed_over(run):
    values = json.loads(run.provenance.read_text())
    values["files"] = dict.fromkeys(("../run/rules/a.safetensors", "/"), values["files"]["rules/a.safetensors"])
    run.provenance.write_text(json.dumps(values))
    assert load(run) == {}


def test_the_commit_is_that_of_a_checkout_only(monkeypatch, tmp_path):
    provenance._commit.cache_clear()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "site-packages" / "dynlm" / "provenance.py"))
    assert provenance._commit() is None
    provenance._commit.cache_clear()


def test_env_names_the_processor(capsys):
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["processor"] == provenance.processor()
