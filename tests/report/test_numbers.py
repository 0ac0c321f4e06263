"""Numbers for people: three significant digits, whatever their size."""

import math

import pytest

from dynlm.report.numbers import likelier, plus, three


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.00491, "0.00491"),
        (0.9999, "1.00"),
        (3.14159, "3.14"),
        (31.149, "31.1"),
        (317.4, "317"),
        (999.9, "1,000"),
        (4189, "4,190"),
        (37477.84, "37,500"),
        (999_499, "999,000"),
        (792_896_221.84, "7.93 × 10⁸"),
        (1e300, "1.00 × 10³⁰⁰"),
        (-2.5, "−2.50"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "–"),
    ],
)
def test_three_digits(value, shown):
    assert three(value) == shown


def test_gains_are_told_as_differences_and_as_likelihoods():
    assert [plus(v) for v in (1.9534, -0.25, 0)] == ["+1.95", "−0.250", "0"]
    assert likelier(1.9534) == "each token 7.05 × likelier"
    assert likelier(-math.log(2)) == "each token 2.00 × less likely"
    assert likelier(600) == "each token 3.77 × 10²⁶⁰ × likelier"
    assert likelier(-1e9) == "each token more than 10³⁰⁰ × less likely"
