"""A whole small run that the tests of commands share: a real text, every stage once."""

import shutil

import pytest

from chain import run_chain


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(recipe file, run directory) after the whole chain, on a few articles of Python's own documentation."""
    from dynlm.data.articles import DataConfig, read_pools

    folder = tmp_path_factory.mktemp("chain")
    rows = [{"title": a.title, "text": a.text[:3000]} for a in read_pools(DataConfig())["all"][:40]]
    return run_chain(folder, rows)


@pytest.fixture
def plain_reports(monkeypatch):
    """Reports without their charts, which take most of the time and have tests of their own."""
    monkeypatch.setattr("dynlm.report.svg.Drawing.html", lambda drawing: f"<p>{drawing.name}</p>")


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to break."""
    recipe, run = finished
    shutil.copytree(run, tmp_path / "run")
    return recipe, tmp_path / "run"
