"""How windows are cut into slices, and whether that bounds what is kept."""

import itertools

import pytest

from dynlm.allocator import MIB
from dynlm.meta.slices import SliceCost, choose_slices, leanest
from dynlm.meta.unroll import Unroll, UnrollConfig
from dynlm.types import InputError
from support.rules import make
from support.windows import read_window

COST = SliceCost(position=20 * MIB, segment=25 * MIB)


def test_peak_counts_positions_of_every_level_and_one_slice():
    assert COST.peak(100, ()) == 2500 * MIB
    assert COST.peak(100, (10,)) == (10 * 20 + 10 * 25) * MIB
    assert COST.peak(1000, (100, 8)) == (10 * 20 + 13 * 20 + 8 * 25) * MIB


def test_the_fewest_levels_that_fit_are_chosen():
    assert choose_slices(16, COST, 1024 * MIB) == ()
    (one,) = choose_slices(256, COST, 1024 * MIB)
    assert COST.peak(256, (one,)) <= 1024 * MIB
    two = choose_slices(1024, COST, 1024 * MIB)
    assert len(two) == 2
    assert COST.peak(1024, two) <= 1024 * MIB


def test_the_leanest_choice_is_near_the_best_of_all():
    best = min(COST.peak(200, pair) for pair in itertools.product(range(1, 201), repeat=2) if pair[0] > pair[1])
    assert COST.peak(200, leanest(200, COST, 2)) <= 1.1 * best


def test_a_window_that_never_fits_is_refused_with_what_it_needs():
    with pytest.raises(
        InputError, match=r"a window of 4096 segments needs [\d,]+ MiB in slices of .*, the budget is 50"
    ):
        choose_slices(4096, COST, 50 * MIB)


@pytest.mark.parametrize("fused", [True, False])
def test_the_graph_of_a_segment_is_measured(lab, fused):
    _, score, priors = lab
    costs = {}
    for name in ("sgd", "gated"):
        rule = make(name, priors)
        _, start, pieces, _, adapted = read_window(lab, rule, 20)
        costs[name] = Unroll(score, rule, adapted, priors, UnrollConfig(fused=fused)).cost(start, pieces[0])
    n = sum(p.theta0.numel() for p in priors)
    assert costs["sgd"].position == 8 * n
    assert costs["gated"].position == 3 * 8 * n
    if fused:  # θ, g and the slots: nothing else
        assert 4 * 8 * n <= costs["gated"].segment < 6 * 8 * n
    else:
        assert costs["gated"].segment > 20 * 8 * n
