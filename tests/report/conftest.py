"""Fixtures of the tests of pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dynlm.report.svg import Drawing
from tests.support.evaluations import FakeRun

MakeRun = Callable[..., FakeRun]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(methods: Sequence[str] = ("static", "sgd", "rms", "gated"), articles: int = 10, reset: str = "article"):
        return FakeRun(tmp_path / "run", methods, articles, reset)

    return make


@pytest.fixture
def quick_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace each figure by a bare element, as drawing takes seconds; tests marked ``drawn`` draw them."""
    if "drawn" not in request.keywords:
        monkeypatch.setattr(Drawing, "svg", lambda self, narrow=False: f"<svg id='{self.name}{narrow}'></svg>")
