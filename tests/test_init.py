"""The public names, and what importing the package costs."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dynlm


def test_every_public_name_is_there_and_has_a_docstring():
    assert len(dynlm.__all__) <= 15
    for name in dynlm.__all__:
        assert getattr(dynlm, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        dynlm.Nothing  # noqa: B018


@pytest.mark.parametrize("package", ["dynlm", "dynlm.optim"])
def test_type_checkers_see_what_runs(package):
    """mypy checks tests/public_types.py, which claims a real type of every public name; here: that none is missing."""
    module = importlib.import_module(package)
    claimed = set(re.findall(rf"{re.escape(package)}\.(\w+)", Path(__file__).with_name("public_types.py").read_text()))
    assert set(module.__all__) <= claimed
    for name in module.__all__:
        thing = getattr(module, name)
        assert (thing.__name__ if inspect.ismodule(thing) else thing.__module__).startswith("dynlm."), name


def test_the_signatures_of_public_names_are_those_that_are_written_down():
    """A changed signature is a change for users: write it down in tests/public_names.txt and in CHANGELOG.md."""
    found = []
    for package in ("dynlm", "dynlm.optim"):
        module = importlib.import_module(package)
        for name in sorted(module.__all__):
            thing = getattr(module, name)
            if inspect.ismodule(thing):
                signature = ""
            elif not inspect.isclass(thing):
                signature = inspect.signature(thing)
            elif any("__init__" in vars(base) for base in thing.__mro__ if base.__module__.startswith("dynlm.")):
                signature = inspect.signature(thing.__init__)
            else:  # the constructor is another library's, and libraries wrap torch's own while they run
                signature = ""
            found.append(f"{package}.{name}{signature}")
    written = Path(__file__).with_name("public_names.txt").read_text().splitlines()
    assert found == written


def test_importing_runs_nothing():
    code = "import dynlm, sys; assert 'torch' not in sys.modules; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import dynlm.cli.main, sys; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_every_module_is_there_without_datasets():
    """Images for GPUs often lack it: only what opens a source of the hub may ask for it. lm-eval has one module."""
    code = """
import importlib, pkgutil, sys
sys.modules["datasets"] = sys.modules["lm_eval"] = None  # an import of them fails
import dynlm
for module in pkgutil.walk_packages(dynlm.__path__, "dynlm."):
    try:
        importlib.import_module(module.name)
    except dynlm.InputError as error:
        assert module.name == "dynlm.lm_eval"
        assert str(error).endswith(": pip install dynlm[lm-eval]")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
