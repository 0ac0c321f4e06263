"""The keel: the replay engine and the plain unroll give the same meta-gradient."""

import copy
from types import SimpleNamespace

import pytest
import torch

from dynlm.inner import InnerLoop, ReadConfig, Update
from dynlm.meta.recording import RecordConfig, Recording
from dynlm.meta.replay import Replay, ReplayConfig, sampling_error
from dynlm.meta.sampling import sample_coordinates
from dynlm.meta.unroll import Unroll, UnrollConfig
from dynlm.optim.base import Seen
from dynlm.optim.handmade import SGD
from lab import make_lab
from support.rules import READING, make
from support.windows import SEGMENT, flat, gradients, read_window

TRUST = ReadConfig.trust  # on these few weights it binds, so that every engine must keep to it
FUSED, PLAIN = ReplayConfig(), ReplayConfig(fused=False, memory=0)  # no memory: the smallest blocks


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("carry", [0, 3])
@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("engine", [FUSED, PLAIN], ids=["fused", "plain"])
def test_replay_equals_unroll(engine, name, carry, layers):
    lab = make_lab(layers=layers)
    _, score, priors = lab
    rule = make(name, priors)
    recording, start, pieces, weights, adapted = read_window(lab, rule, 42, carry)
    Replay(rule, engine)(recording)
    replayed = gradients(rule)
    Unroll(score, rule, adapted, priors, UnrollConfig(), trust=TRUST).run(start, pieces, weights).loss.backward()
    unrolled = gradients(rule)
    assert replayed.keys() == unrolled.keys()
    assert all(g.abs().max() > 0 for g in unrolled.values()), "a meta-parameter that never learns"
    for key, expected in unrolled.items():
        torch.testing.assert_close(replayed[key], expected, rtol=1e-9, atol=1e-13, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", READING)
def test_every_meta_parameter_is_reached(lab, name):
    rule = make(name, lab[2])
    recording, *_ = read_window(lab, rule, 42)
    Replay(rule)(recording)
    assert set(gradients(rule)) == {name for name, _ in rule.named_parameters()}


def test_unroll_meta_loss_is_what_reading_scored(lab):
    model, score, priors = lab
    rule = make("gated", priors)
    _, start, pieces, weights, adapted = read_window(lab, rule, 42)
    with InnerLoop(model, score, rule, priors, ReadConfig(segment=SEGMENT, kernel="eager")) as reader:
        means = [reader.segment(*piece).losses_S.mean() for piece in pieces]
    expected = sum(w * m for w, m in zip(weights, means, strict=True))
    actual = Unroll(score, rule, adapted, priors, UnrollConfig(), trust=TRUST).run(start, pieces, weights).loss
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


def resample(recording, generator, n_sampled):
    """The same window with other coordinates drawn: ``recording`` must hold them all."""
    whole, n = recording, len(recording)
    shapes = [p.theta0.shape for p in whole.priors]
    state = SimpleNamespace(
        slots=[tuple(x.view(*s, *x.shape[1:]) for x in xs) for xs, s in zip(whole.slots, shapes, strict=True)],
        tensors=whole.tensors,
    )
    thetas = [x.view(s) for x, s in zip(whole.theta, shapes, strict=True)]
    reader = SimpleNamespace(priors=whole.priors, thetas=thetas, state=state)
    sampled = Recording(reader, sample_coordinates([t.numel() for t in thetas], n_sampled, generator, smallest=4), n)
    for t in range(n):
        grads = [whole.grads.parts[i][t].view(s) for i, s in enumerate(shapes)]
        rows = tuple(tuple(x[t][:, None] for x in xs) for xs in whole.rows)
        cols = tuple(tuple(x[t][None] for x in xs) for xs in whole.cols)
        step = Update(torch.empty(0), grads, Seen(rows, cols, whole.scalars[t]))
        sampled.add(step, whole.steps[t], whole.weights[t])
    return sampled


@pytest.mark.parametrize("name", ["rms", "adam"])
def test_sampled_replay_is_unbiased(lab, name):
    rule = make(name, lab[2])
    recording, *_ = read_window(lab, rule, 20)
    replay, generator, draws = Replay(rule), torch.Generator().manual_seed(1), []
    replay(recording)
    exact = flat(rule)
    for _ in range(2000):
        replay(resample(recording, generator, 60))
        draws.append(flat(rule))
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert (error > 0).all()
    assert ((draws.mean(0) - exact).abs() < 3 * error).all()


def test_measured_sampling_error_covers_the_true_one(lab):
    rule = make("rms", lab[2])
    recording, *_ = read_window(lab, rule, 30)
    replay, generator = Replay(rule), torch.Generator().manual_seed(2)
    rule.lr.grad = torch.tensor(7.0, dtype=torch.float64)
    estimate, _ = sampling_error(replay, recording)
    assert rule.lr.grad == 7, "gradients that were there stay"
    rule.zero_grad(set_to_none=True)
    replay(recording)
    exact = flat(rule)
    torch.testing.assert_close(estimate, exact, rtol=0.3, atol=0)
    actual, claimed = [], []
    for _ in range(200):
        sampled = resample(recording, generator, 120)
        _, error = sampling_error(replay, sampled)
        replay(sampled)
        actual.append(flat(rule) - exact)
        claimed.append(error)
    actual, claimed = torch.stack(actual).square().mean(0).sqrt(), torch.stack(claimed).square().mean(0).sqrt()
    assert (claimed > 0.8 * actual).all(), (claimed, actual)
    assert (claimed < 3 * actual).all(), (claimed, actual)


@pytest.mark.parametrize("where", ["device", "cpu", "disk"])
@pytest.mark.parametrize("dtype", ["weights", "bf16"])
def test_recordings_elsewhere_and_in_half_precision(lab, where, dtype):
    rule = make("gated", lab[2])
    replay = Replay(rule)
    plain, *_ = read_window(lab, rule, 42)
    kept, *_ = read_window(lab, rule, 42, record=RecordConfig(dtype, where))
    replay(plain)
    exact = flat(rule)
    replay(kept)
    tolerance = {"weights": 0.0, "bf16": 2e-2}[dtype]
    assert (flat(rule) - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("name", ["gated", "lstm", "mlp"])
def test_blocks_of_every_size_give_the_same_gradient(lab, name, monkeypatch):
    rule = make(name, lab[2])
    recording, *_ = read_window(lab, rule, 42)
    results = []
    for block in (10**9, 97, 7):
        monkeypatch.setattr(Replay, "_block", lambda self, *_, block=block: block)
        Replay(rule, PLAIN)(recording)
        results.append(flat(rule))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-11, atol=1e-14)


def test_blocks_follow_the_budget(lab):
    rule = make("lstm", lab[2])
    recording, *_ = read_window(lab, rule, 42)
    sizes = []
    for memory in (1, 2, 8):
        replay = Replay(rule, ReplayConfig(memory, fused=False))
        sizes.append(replay._block(recording, 0, replay._contexts(recording)[:, 0].detach(), False))
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[2] == pytest.approx(8 * sizes[0], rel=0.01)


def test_strata_cover_and_weigh_every_coordinate():
    strata = sample_coordinates([10, 1000, 5000], 600, torch.Generator().manual_seed(0), smallest=50)
    assert [s.index_K.numel() for s in strata] == [10, 100, 499]
    for stratum, size in zip(strata, [10, 1000, 5000], strict=True):
        assert stratum.index_K.max() < size
        assert stratum.index_K.numel() * stratum.weight == pytest.approx(size)
    assert torch.equal(strata[0].index_K, torch.arange(10))
