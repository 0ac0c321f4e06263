"""Fixtures of the tests of rules."""

import pytest


@pytest.fixture
def eager(monkeypatch):
    """Most tests need no C: what is compiled equals what is not, and some tests say so."""
    monkeypatch.setenv("DYNLM_KERNEL", "eager")
