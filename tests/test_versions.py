"""The ranges of pyproject.toml: what scripts/test_versions installs at their ends, and that the tested releases fit."""

import importlib.machinery
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script():
    """scripts/test_versions has no .py suffix, so its loader is named."""
    loader = importlib.machinery.SourceFileLoader("versions_of_scripts", str(ROOT / "scripts" / "test_versions"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (project["optional-dependencies"][name] for name in ("lm", "tune", "report", "lora"))
    found = [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]
    return [bound for bound in found if bound.name != "dynlm"]


def test_the_lowest_set_is_the_lower_bounds_and_the_newest_has_none(script):
    lowest, newest = ([Requirement(line) for line in script.requirements(w)] for w in ("lowest", "newest"))
    assert [str(low.specifier) for low in lowest] == [str(bound.specifier).replace(">=", "==") for bound in bounds()]
    assert [low.name for low in lowest] == [new.name for new in newest] == [bound.name for bound in bounds()]
    assert not any(new.specifier for new in newest)
    assert set(script.SHOWN) <= {bound.name for bound in bounds()}


def test_a_bound_of_another_form_is_one_line(script, monkeypatch, tmp_path):
    text = '[project]\ndependencies = ["torch<3"]\n[project.optional-dependencies]\n'
    text += "".join(f"{extra} = []\n" for extra in script.EXTRAS)
    (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"'torch<3' in pyproject.toml is not of the form name>=version"):
        script.requirements("lowest")


def test_every_folder_of_tests_that_it_runs_exists(script):
    assert all((ROOT / path).exists() for path in script.TESTS)


def test_the_tested_releases_lie_in_the_ranges():
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    tested = {name.lower(): version for name, version in pins}
    assert all(bound.specifier.contains(tested[bound.name]) for bound in bounds())
