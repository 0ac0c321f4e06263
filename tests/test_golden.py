"""The numbers of the whole chain and of the shipped kit stand still."""

import json

import pytest

import golden


@pytest.mark.usefixtures("plain_reports")
def test_no_number_has_moved(tmp_path):
    """If you did not intend to change what is computed, something is wrong: find it before anything else.

    If you did, say in docs/LOG.md what moved and why, and accept the new numbers: ``python tests/golden.py --write``.
    """
    lines = golden.moved(golden.compute(tmp_path), json.loads(golden.PATH.read_text()))
    advice = "if this was intended, log why and run `python tests/golden.py --write`; if not, find what moved it"
    assert not lines, "\n".join([*lines, advice])


def test_a_number_that_moves_is_named():
    numbers = {"a.nats": 2.0, "a.bits": "x", "tokens": 3}
    here, there = ({"machine": machine, "numbers": numbers} for machine in (golden.machine(), "another"))
    assert golden.moved(numbers, here) == golden.moved(numbers, there) == []
    near = numbers | {"a.nats": 2.0 + 1e-7, "a.bits": "y"}
    assert golden.moved(near, here) == ["a.bits was x, is y", "a.nats was 2.0, is 2.0000001"]
    assert golden.moved(near, there) == []
    assert golden.moved(numbers | {"a.nats": 2.1, "tokens": 4}, there) == [
        "a.nats was 2.0, is 2.1",
        "tokens was 3, is 4",
    ]
    assert golden.moved({"a.nats": 2.0, "b": 1.0}, there) == ["a.bits is gone", "b is new", "tokens is gone"]
