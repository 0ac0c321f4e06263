"""Fixtures of all tests."""

import os
from pathlib import Path

import pytest
import torch

from dynlm.optim.registry import RULES
from lab import make_lab


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and one thread makes sums repeatable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def wikitext2():
    """The folder of WikiText-2, or a visible skip."""
    folder = os.environ.get("DYNLM_WIKITEXT2")
    if not folder:
        pytest.skip("DYNLM_WIKITEXT2 is not set: point it at the folder of wiki.train.tokens")
    return Path(folder)


@pytest.fixture
def own_rules():
    """Rules that the test registers are forgotten after it."""
    known = dict(RULES)
    yield
    RULES.clear()
    RULES.update(known)


@pytest.fixture
def lab():
    return make_lab()
