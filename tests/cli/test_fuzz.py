"""scripts/fuzz judges what it must, and a small part of it runs here on the finished run."""

import importlib.machinery
import importlib.util
import os
import random
import shutil
import sys
import warnings
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "scripts" / "fuzz"


def load_fuzz():
    """scripts/fuzz has no .py suffix, so its loader is named."""
    loader = importlib.machinery.SourceFileLoader("fuzz", str(PATH))
    spec = importlib.util.spec_from_loader("fuzz", loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # where its dataclass looks for types
    before = dict(os.environ)
    loader.exec_module(module)
    os.environ.clear()
    os.environ.update(before)
    return module


fuzz = load_fuzz()


@pytest.fixture
def tiny(finished, tmp_path, monkeypatch):
    """The finished run as scripts/fuzz lays it out; starts, checkpoints and memories are left to the script."""
    recipe, run = finished
    shutil.copytree(run, tmp_path / "tiny" / "run")
    (tmp_path / "tiny" / "recipe.toml").write_text(fuzz.RECIPE.format(source=recipe.parent / "docs.jsonl"))
    (tmp_path / "tiny" / "t.txt").write_text("A text of some words that are read.\n" * 9)
    there = {name: command for name, command in fuzz.TENSORS.items() if (tmp_path / "tiny" / name).exists()}
    monkeypatch.setattr(fuzz, "TENSORS", there)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tiny"


def test_a_part_of_the_cases_of_each_kind(tiny, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads
        assert fuzz.fuzz(tiny, cases=24, seed=20261126, whole_every=24) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("24 cases, seed 20261126, ")


@pytest.mark.parametrize(
    ("code", "said", "refused", "after", "verdict"),
    [
        (0, "", False, {}, ""),
        (2, "threads: 1\ndynlm: note: x\ndynlm: it is wrong\n", True, {}, ""),
        (2, "dynlm: it is wrong\nand more\n", False, {}, "no single line"),
        (2, "dynlm: a\ndynlm: b\n", False, {}, "no single line"),
        (1, "Traceback (most recent call last)\nKeyError: 'x'\n", False, {}, "exit code 1: KeyError: 'x'"),
        (-6, "", False, {}, "exit code -6: nothing said"),
        (0, "", True, {}, "it was accepted"),
        (2, "dynlm: it is wrong\n", False, {"run/rules/rms": "other"}, "changed or removed: run/rules/rms"),
        (0, "", False, {"run/model/config.json": "other"}, "changed or removed: run/model/config.json"),
        (0, "", False, {"run/rules/rms": "other"}, ""),
    ],
)
def test_the_judgement(code, said, refused, after, verdict):
    before = {"run/rules/rms": "one", "run/model/config.json": "two"}
    found = fuzz.judge(fuzz.Case(["evaluate"], refused=refused), code, said, before, before | after)
    assert found.startswith(verdict) if verdict else not found


def test_cases_depend_on_the_seed_alone(tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    for make, _ in fuzz.KINDS.values():
        one, again = (make(random.Random(7)) for _ in range(2))
        assert (one.arguments, one.refused, one.told) == (again.arguments, again.refused, again.told)
