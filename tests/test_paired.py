"""Intervals and tests against numbers worked out by hand."""

import pytest
import torch

from dynlm.paired import bootstrap_ratio, holm, paired_gain, sign_flip_p


def test_paired_gain_weighs_tokens_and_its_interval_draws_articles():
    baseline = [torch.full((10,), 2.0), torch.full((30,), 3.0)]
    method = [torch.full((10,), 1.0), torch.full((30,), 3.0)]
    gain, (low, high) = paired_gain(baseline, method)
    assert gain == pytest.approx(10 / 40)
    assert (low, high) == (pytest.approx(0.0), pytest.approx(1.0))  # either article may fill both places


def test_interval_shrinks_with_articles_and_is_repeatable():
    sums = torch.randn(400, generator=torch.Generator().manual_seed(0)).double() + 1
    sizes = torch.ones(400)
    low, high = bootstrap_ratio(sums, sizes)
    assert (low, high) == bootstrap_ratio(sums, sizes)
    assert high - low == pytest.approx(2 * 1.96 * sums.std().item() / 20, rel=0.1)
    few = bootstrap_ratio(sums[:25], sizes[:25])
    assert few[1] - few[0] > 2.5 * (high - low)


def test_sign_flips_are_exact_for_few_articles_and_close_for_many():
    assert sign_flip_p(torch.tensor([1.0, 2.0, 3.0])) == 2 / 8
    assert sign_flip_p(torch.tensor([3.0, -1.0, 0.5])) == 6 / 8
    assert sign_flip_p(torch.zeros(4)) == 1.0
    gains = torch.randn(16, generator=torch.Generator().manual_seed(0)).double() + 0.5
    signs = (torch.arange(2**16)[:, None] >> torch.arange(16)) % 2 * 2.0 - 1
    exact = float(((signs.double() @ gains).abs() >= float(gains.sum().abs()) - 1e-9).double().mean())
    assert sign_flip_p(gains) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(torch.ones(60)) == 1 / 10_001


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
