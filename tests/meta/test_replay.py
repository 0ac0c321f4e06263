"""The keel: the replay engine and the plain unroll give the same meta-gradient."""

import copy
from functools import partial

import pytest
import torch

from dynlm.adapt import ReadConfig, Reader
from dynlm.data.segments import article_segments
from dynlm.meta.replay import Recording, replay, replay_eagerly, sample_coordinates
from dynlm.meta.unroll import Unroll, UnrollConfig
from dynlm.optim.handmade import RMS, SGD, Adam
from dynlm.optim.learned import Gated
from lab import START, make_article, make_lab

SEGMENT = 5
SETTINGS = {"lr": 3e-2, "eps": 1e-3, "decay": 1e-2}


def gated(priors):
    rule = Gated.from_rms(SETTINGS, priors, hidden=3).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # away from the start, so that every gate and every input has a part in the result
        for parameter in rule.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return rule


RULES = {
    "sgd": lambda priors: SGD(0.3, 0.01),
    "rms": lambda priors: RMS(**SETTINGS),
    "adam": lambda priors: Adam(0.02, 1e-3, 0.01),
    "gated": gated,
}


def read_window(lab, rule, n_tokens, carry=0, sampled=0, generator=None):
    """Read ``carry`` segments, then a recorded window; returns (recording, position before it, pieces, weights)."""
    model, score, priors = lab
    pieces = list(article_segments(make_article(n_tokens, seed=3).ids_T, START, SEGMENT))
    with Reader(model, score, rule, priors, ReadConfig(segment=SEGMENT, kernel="eager")) as reader:
        for piece in pieces[:carry]:
            reader.segment(*piece)
        start = reader.snapshot()
        generator = generator or torch.Generator().manual_seed(0)
        strata = sample_coordinates([t.numel() for t in reader.thetas], sampled, generator, smallest=4)
        recording = Recording.begin(reader, strata)
        weights = [0.1 + 0.05 * t for t in range(len(pieces) - carry)]
        for piece, weight in zip(pieces[carry:], weights, strict=True):
            recording.add(reader.segment(*piece), reader.state.clock, weight)
        return recording, start, pieces[carry:], weights, reader.adapted


def gradients(rule):
    result = {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}
    rule.zero_grad(set_to_none=True)
    return result


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("carry", [0, 3])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("engine", [replay, partial(replay_eagerly, block=50)], ids=["fused", "eager"])
def test_replay_equals_unroll(engine, name, carry, layers):
    lab = make_lab(layers=layers)
    model, score, priors = lab
    rule = RULES[name](priors)
    recording, start, pieces, weights, adapted = read_window(lab, rule, 42, carry)
    engine(rule, recording)
    replayed = gradients(rule)
    Unroll(score, rule, adapted, priors, UnrollConfig()).run(start, pieces, weights).loss.backward()
    unrolled = gradients(rule)
    assert replayed.keys() == unrolled.keys()
    assert all(g.abs().max() > 0 for g in unrolled.values()), "a meta-parameter that never learns"
    for key, expected in unrolled.items():
        torch.testing.assert_close(replayed[key], expected, rtol=1e-9, atol=1e-13, msg=lambda m, k=key: f"{k}: {m}")


def test_every_meta_parameter_of_the_gated_rule_is_reached(lab):
    rule = gated(lab[2])
    recording, *_ = read_window(lab, rule, 42)
    replay(rule, recording)
    assert set(gradients(rule)) == {name for name, _ in rule.named_parameters()}


def test_unroll_meta_loss_is_what_reading_scored(lab):
    model, score, priors = lab
    rule = gated(priors)
    _, start, pieces, weights, adapted = read_window(lab, rule, 42)
    with Reader(model, score, rule, priors, ReadConfig(segment=SEGMENT, kernel="eager")) as reader:
        means = [reader.segment(*piece).losses_S.mean() for piece in pieces]
    expected = sum(w * m for w, m in zip(weights, means, strict=True))
    actual = Unroll(score, rule, adapted, priors, UnrollConfig()).run(start, pieces, weights).loss
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-12, atol=0)


def test_second_order_unroll_matches_finite_differences(lab):
    model, carrying, priors = lab

    def score(inputs_S, targets_S, hidden):  # without carry: what is detached between segments has no derivative
        return carrying(inputs_S, targets_S, None)[0], None

    lab = model, score, priors
    rule = SGD(0.4, 0.02)
    _, start, pieces, weights, adapted = read_window(lab, rule, 20)
    Unroll(score, rule, adapted, priors, UnrollConfig(order=2)).run(start, pieces, weights).loss.backward()
    exact = rule.lr.grad.item()
    h = 1e-5
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(rule)
        moved.lr.data += sign * h
        values.append(Unroll(score, moved, adapted, priors, UnrollConfig()).run(start, pieces, weights).loss.item())
    assert exact == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


def test_sampled_replay_is_unbiased(lab):
    rule = RMS(**SETTINGS)
    recording, *_ = read_window(lab, rule, 30)
    replay(rule, recording)
    exact = torch.stack(list(gradients(rule).values()))
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(400):
        sampled, *_ = read_window(lab, rule, 30, sampled=60, generator=generator)
        replay(rule, sampled)
        draws.append(torch.stack(list(gradients(rule).values())))
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert (error > 0).all()
    assert ((draws.mean(0) - exact).abs() < 3.5 * error).all()


def test_strata_cover_and_weigh_every_coordinate():
    strata = sample_coordinates([10, 1000, 5000], 600, torch.Generator().manual_seed(0), smallest=50)
    assert [s.index_K.numel() for s in strata] == [10, 100, 499]
    for stratum, size in zip(strata, [10, 1000, 5000], strict=True):
        assert stratum.index_K.max() < size
        assert stratum.index_K.numel() * stratum.weight == pytest.approx(size)
    assert torch.equal(strata[0].index_K, torch.arange(10))
