"""Numbers as people want them: three significant digits and no more."""

from __future__ import annotations

import math

SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
MILLION = 1e6
BEYOND = 1e300  # factors are computed up to about 10³⁰⁴, and stand for all beyond
DIGITS = 3
SANE_PERPLEXITY = 1e5
"""beyond it a perplexity by word says nothing to anybody"""


def three(value: float) -> str:
    """Three significant digits: ``0.00491``, ``31.1``, ``4,190``, ``7.93 × 10⁸``."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "–" if math.isnan(value) else "\N{MINUS SIGN}∞"
    if value == 0:
        return "0"
    if value < 0:
        return f"\N{MINUS SIGN}{three(-value)}"
    exponent = int(f"{value:.{DIGITS - 1}e}".partition("e")[2])  # after rounding: 999.9 is 1,000
    if value >= MILLION:
        return f"{value / 10**exponent:.{DIGITS - 1}f} × 10{str(exponent).translate(SUPERSCRIPTS)}"
    return f"{round(value, DIGITS - 1 - exponent):,.{max(0, DIGITS - 1 - exponent)}f}"


def likelier(gain: float) -> str:
    """Say what a gain in nats makes of the probability of a token, as a geometric mean over tokens."""
    return f"each token {times(math.exp(min(abs(gain), 700.0)))} × {'likelier' if gain >= 0 else 'less likely'}"


def times(factor: float) -> str:
    """Return a factor to three digits, as far as it could be computed."""
    return three(factor) if factor < BEYOND else "more than 10³⁰⁰"


def plus(value: float) -> str:
    """Return a difference to three digits, with its sign."""
    return f"{'+' if value > 0 else ''}{three(value)}"
