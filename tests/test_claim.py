"""A run directory is dynlm's or empty, one command works in it, and what a killed one left is completed or removed."""

import os
import signal
import subprocess
import sys

import pytest

from dynlm.changes import COMMIT, LIST
from dynlm.claim import LOCK, claim, recover
from dynlm.files import replacing, write_json
from dynlm.runs import Run
from dynlm.stamps import Stamp, fingerprint_files, read_stamped
from dynlm.types import InputError

HOLDER = """
import sys, time
from dynlm.claim import claim
from dynlm.runs import Run
with claim(Run(sys.argv[1]), begins=True):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    write_json(run.recipe, Stamp().put_on({"run": "run"}))
    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(run, message, **more):
    with pytest.raises(InputError, match=message), claim(run, **more):
        pytest.fail("it was claimed")


def test_an_empty_folder_is_claimed_and_left_as_it_was(tmp_path):
    for path in (tmp_path, tmp_path / "not" / "yet"):
        with claim(Run(path), begins=True):
            assert names(path) == [LOCK]
    assert names(tmp_path) == []


def test_a_folder_of_other_files_is_refused_and_not_touched(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "fig1.pdf").write_text("mine")
    refused(Run(tmp_path), r"is no run of dynlm and holds other files \('figures'\)", begins=True)
    assert names(tmp_path) == ["figures"]
    refused(Run(tmp_path / "figures" / "fig1.pdf"), "is a file", begins=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no schema number"),
        ({"run": "x", "data": {}}, "has no schema number"),
        ({"dynlm": 3}, "has no schema number"),
        ({"dynlm": {"schema": 2}}, "has schema 2, this version of dynlm reads 1"),
        ({"dynlm": {"schema": 1, "finished": "yes"}}, "was changed"),
    ],
)
def test_a_recipe_of_others_is_refused(tmp_path, content, message):
    write_json(tmp_path / "recipe.json", content)
    refused(Run(tmp_path), message, begins=True)
    assert names(tmp_path) == ["recipe.json"]


def test_two_commands_in_one_run_are_refused_until_the_first_ends_in_whatever_way(run):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        refused(run, rf"another dynlm works in .*run \(process {holder.pid}\)")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert LOCK in names(run.path)
    with claim(run):
        pass
    assert names(run.path) == ["recipe.json"]


def test_what_killed_commands_left_is_removed_and_other_files_are_not(run):
    for name in (".next.abcd1234", "rules/.rms.abcd1234", "rules/.mine.abcd1234", "rules/.model.x", "rules/rms"):
        (run.path / name).mkdir(parents=True)
    (run.path / "rules" / ".rms.abcd1234" / "rms").write_text("half")
    (run.path / "rules" / ".rms.abcd1234" / ".mode.abcd1234").mkdir()
    (run.path / "rules" / ".rms.abcd1234" / ".tmpU91b7g").write_text("half, by safetensors")
    (run.path / "rules" / ".mine.abcd1234" / "notes").write_text("mine")
    with claim(run):
        assert names(run.path / "rules") == [".mine.abcd1234", ".model.x", "rms"]
    assert names(run.path) == ["recipe.json", "rules"]


def test_a_folder_that_was_moved_aside_comes_back(run):
    aside = run.path / ".model.abcd1234" / "old"
    aside.mkdir(parents=True)
    (aside / "weights").write_text("old")
    with claim(run):
        assert (run.model / "weights").read_text() == "old"
    assert names(run.path) == ["model", "recipe.json"]


def test_what_was_decided_is_done_before_anything_is_read(run):
    commit = run.path / COMMIT
    (commit / "new").mkdir(parents=True)
    (commit / "new" / "prior.safetensors").write_text("new")
    write_json(commit / LIST, {"remove": [], "place": ["prior.safetensors"]})
    recover(run)
    assert names(run.path) == ["prior.safetensors", "recipe.json"]
    recover(run)


def test_where_nothing_can_be_written_a_command_that_only_reads_goes_on(run, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with claim(run, writes=False):
        assert names(run.path) == ["recipe.json"]


def test_other_processes_of_one_training_share_the_claim(run, monkeypatch):
    with claim(run):
        monkeypatch.setenv("RANK", "1")
        with claim(run):
            pass
        assert LOCK in names(run.path)


def test_fingerprints_see_names_and_contents(tmp_path):
    for name, text in (("a/x", "1"), ("b/x", "1"), ("c/x", "2"), ("d/y", "1"), ("e/sub/x", "1")):
        with replacing(tmp_path / name) as temporary:
            temporary.write_text(text)
    prints = [fingerprint_files(tmp_path / name) for name in "abcde"]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4
    (tmp_path / "a" / ".DS_Store").write_text("")
    (tmp_path / "a" / "__pycache__").mkdir()
    (tmp_path / "a" / "__pycache__" / "x.pyc").write_text("")
    assert fingerprint_files(tmp_path / "a") == prints[0]
    assert fingerprint_files(tmp_path / "a" / "x") != fingerprint_files(tmp_path / "c" / "x")


def test_a_stamp_comes_back(tmp_path):
    stamp = Stamp(False, {"data": "0" * 16})
    write_json(tmp_path / "recipe.json", stamp.put_on({"run": "x"}))
    assert read_stamped(tmp_path / "recipe.json") == ({"run": "x"}, stamp)
    with pytest.raises(InputError, match=r"the data differs: here has the fingerprint b, .* with 0{16}: put it back"):
        stamp.require("data", "b", "here", "put it back")
