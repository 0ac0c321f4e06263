"""The public names, and what importing the package costs."""

import subprocess
import sys

import pytest

import dynlm


def test_every_public_name_is_there_and_has_a_docstring():
    assert len(dynlm.__all__) <= 15
    for name in dynlm.__all__:
        assert getattr(dynlm, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        dynlm.Nothing  # noqa: B018


def test_importing_runs_nothing():
    code = "import dynlm, sys; assert 'torch' not in sys.modules; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import dynlm.cli.main, sys; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_every_module_is_there_without_datasets():
    """Images for GPUs often lack it: only what opens a source of the hub may ask for it."""
    code = """
import importlib, pkgutil, sys
sys.modules["datasets"] = None  # an import of it fails
import dynlm
for module in pkgutil.walk_packages(dynlm.__path__, "dynlm."):
    importlib.import_module(module.name)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
