"""All estimators of the meta-gradient behind one signature, against each other."""

import functools

import pytest
import torch

from dynlm.inner import InnerLoop, ReadConfig
from dynlm.meta.estimators import EstimatorConfig, affordable, make_estimator, observed_numbers
from dynlm.meta.recording import RecordConfig
from dynlm.meta.sampling import sample_coordinates
from dynlm.optim.handmade import RMS
from dynlm.types import InputError
from lab import make_lab, make_transformer_lab
from support.rules import READING, SETTINGS, make
from support.windows import SEGMENT, flat, pieces_of

EXACT = {
    "replay": EstimatorConfig(coordinates=0),
    "unroll": EstimatorConfig("unroll"),
    "checkpointed": EstimatorConfig("unroll", slices=(3,)),
    "forward": EstimatorConfig("forward", coordinates=0),
}


def make_reader(lab, rule):
    model, score, priors = lab
    return InnerLoop(model, score, rule, priors, ReadConfig(segment=SEGMENT, kernel="eager"))


def estimate(lab, rule, config, windows, generator=None):
    """(summed gradient over the windows, windows)."""
    with make_reader(lab, rule) as reader:
        estimator = make_estimator(reader, config, generator)
        position, results = estimator.begin(), []
        for pieces in windows:
            results.append(estimator.window(position, pieces, [0.1 + 0.05 * t for t in range(len(pieces))]))
            position = results[-1].position
    return flat(rule), results


@pytest.mark.parametrize("lab_of", [make_lab, make_transformer_lab], ids=["lstm", "transformer"])
@pytest.mark.parametrize("name", READING)
def test_exact_estimators_agree(name, lab_of):
    lab = lab_of()
    rule, window = make(name, lab[2]), [pieces_of(26)]
    expected, (read,) = estimate(lab, rule, EXACT["unroll"], window)
    assert expected.abs().max() > 0
    for kind in ("replay", "checkpointed", "forward"):
        actual, (other,) = estimate(lab, rule, EXACT[kind], window)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12, msg=lambda m, k=kind: f"{k}: {m}")
        assert other.nats == pytest.approx(read.nats, rel=1e-12)
        assert other.tokens == read.tokens == 26


@pytest.mark.parametrize("kind", ["replay", "checkpointed"])
def test_windows_are_cut_and_carried(lab, kind):
    rule = make("gated", lab[2])
    pieces = pieces_of(60)
    expected, plain = estimate(lab, rule, EXACT["unroll"], [pieces[:6], pieces[6:]])
    actual, other = estimate(lab, rule, EXACT[kind], [pieces[:6], pieces[6:]])
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert [w.nats for w in other] == pytest.approx([w.nats for w in plain], rel=1e-12)
    whole, _ = estimate(lab, rule, EXACT["unroll"], [pieces])
    assert not torch.allclose(whole, expected, rtol=1e-3), "a cut that changes nothing is no cut"


def test_forward_mode_is_not_truncated(lab):
    rule = make("rms", lab[2])
    pieces = pieces_of(60)
    weights = [0.1] * len(pieces)
    totals = []
    for cuts in ([pieces], [pieces[:5], pieces[5:8], pieces[8:]]):
        with make_reader(lab, rule) as reader:
            estimator = make_estimator(reader, EXACT["forward"])
            position = estimator.begin()
            for part in cuts:
                position = estimator.window(position, part, weights[: len(part)]).position
        totals.append(flat(rule))
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-12, atol=0)


def test_sampled_forward_mode_is_unbiased(lab, monkeypatch):
    rule = make("rms", lab[2])
    window, generator = [pieces_of(15)], torch.Generator().manual_seed(0)
    exact, _ = estimate(lab, rule, EXACT["forward"], window)
    few = functools.partial(sample_coordinates, smallest=4)
    monkeypatch.setattr("dynlm.meta.estimators.sample_coordinates", few)
    config = EstimatorConfig("forward", coordinates=60)
    draws = torch.stack([estimate(lab, rule, config, window, generator)[0] for _ in range(150)])
    error = draws.std(0) / len(draws) ** 0.5
    assert (error > 0).all()
    assert ((draws.mean(0) - exact).abs() < 3.5 * error).all()


def test_evolution_strategies_find_the_untruncated_gradient(lab):
    """Over many pairs, the windows' estimates add up to the gradient through all windows."""
    model, carrying, priors = lab

    def score(inputs_S, targets_S, hidden):  # without carry: what is detached between segments has no derivative
        return carrying(inputs_S, targets_S, None)[0], None

    lab, rule = (model, score, priors), RMS(**SETTINGS)
    pieces = pieces_of(30)
    windows = [pieces[:2], pieces[2:4], pieces[4:]]
    generator = torch.Generator().manual_seed(3)
    config = EstimatorConfig("pes", pairs=1, sigma=1e-3)
    draws = torch.stack([estimate(lab, rule, config, windows, generator)[0] for _ in range(150)])
    with make_reader(lab, rule) as reader:  # exact, but for the curvature that σ sees: all through, gradients included
        estimator = make_estimator(reader, EstimatorConfig("unroll", order=2))
        weights = [0.1 + 0.05 * t for part in windows for t in range(len(part))]
        estimator.window(estimator.begin(), pieces, weights)
    exact = flat(rule)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() < 4 * error).all(), (draws.mean(0), exact, error)
    # the learning rate's gradient is found, not merely not excluded
    assert abs(draws.mean(0)[0] - exact[0]) < 0.6 * abs(exact[0])


def test_evolution_strategies_leave_the_rule_as_it_was(lab):
    rule = make("gated", lab[2])
    before = {name: p.detach().clone() for name, p in rule.named_parameters()}
    estimate(lab, rule, EstimatorConfig("pes"), [pieces_of(12)])
    for name, p in rule.named_parameters():
        assert torch.equal(p, before[name]), name


def test_a_budget_bounds_what_is_recorded(lab):
    reader = make_reader(lab, make("rms", lab[2]))
    n = sum(t.numel() for t in reader.thetas)
    seen = observed_numbers(reader)

    def coordinates(asked, memory, window):
        return affordable(EstimatorConfig(coordinates=asked, record=RecordConfig(memory=memory)), window, reader)

    assert coordinates(10**6, 8, 1024) == 8 * 2**20 // (8 * 1024) - seen
    assert coordinates(50, 8, 1024) == 50
    assert coordinates(0, 8 * (n + seen) * 1024 // 2**20 + 1, 1024) == 0
    with pytest.raises(
        InputError, match=r"all 473 weights over 10000 segments takes \d+ MiB, the budget is 50: sample"
    ):
        coordinates(0, 50, 10000)
    with pytest.raises(InputError, match=r"1 MiB hold no coordinate over 10000 segments, .* raise the memory"):
        coordinates(50, 1, 10000)
