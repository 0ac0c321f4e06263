"""Perplexities and gains against numbers worked out by hand."""

import math

import pytest
import torch

from dynlm.evaluation.metrics import count, gain_by_position, perplexities
from lab import make_article


def test_perplexities_of_a_uniform_model():
    counts = count([make_article(10), make_article(30)])
    assert counts == (2, 40, 40, 120)
    result = perplexities(40 * math.log(8), counts)
    assert result["token_ppl"] == pytest.approx(8)
    assert result["word_ppl"] == pytest.approx(8)
    assert result["bits_per_byte"] == pytest.approx(1.0)  # 3 bits a token of 3 bytes


def test_gain_by_position_covers_every_token_once():
    lengths = [5, 40, 700]
    baseline = [torch.arange(n).float() for n in lengths]
    method = [losses_T - 0.5 for losses_T in baseline]
    bins = gain_by_position(baseline, method)
    assert sum(b["tokens"] for b in bins) == sum(lengths)
    assert [b["from"] for b in bins] == [0, 32, 64, 128, 256, 512]
    assert [b["articles"] for b in bins] == [3, 2, 1, 1, 1, 1]
    assert all(b["gain"] == pytest.approx(0.5) for b in bins)
