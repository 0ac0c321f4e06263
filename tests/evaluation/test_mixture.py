"""Static, adapted and cache predictions mixed by a small network: sums by hand, the fit, files, no leak."""

import math

import pytest
import torch

from dynlm.evaluation.audit import audit
from dynlm.evaluation.audit_articles import excerpt
from dynlm.evaluation.cache import CacheConfig, CachedReader
from dynlm.evaluation.mixture import (
    DECAYS,
    Evidence,
    MixedReader,
    Mixture,
    Sources,
    count_features,
    load_mixture,
    running,
    save_mixture,
)
from dynlm.evaluation.mixture_fit import SourceRecorder, constant_weights, fit_mixture
from dynlm.evaluation.stream import read_articles
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.models.core import LSTMScorer
from dynlm.optim.handmade import SGD, Static
from dynlm.types import InputError
from lab import START, VOCAB, TransformerScorer, make_article, make_lab, make_transformer_lab

CACHE = CacheConfig(weight=0.3, theta=2.0, window=11)
LABS = [(make_lab, LSTMScorer), (make_transformer_lab, TransformerScorer)]


def mixture_of(learns=True, cached=True, seed=0):
    """A network with weights that matter."""
    torch.manual_seed(seed)
    mixture = Mixture(1 + learns + cached, count_features(learns, cached))
    torch.nn.init.normal_(mixture.out.weight)
    return mixture.eval().requires_grad_(False)


def mixed(lab, rule=None, cache=CACHE, scorer=LSTMScorer, kind=MixedReader, **config):
    model, score, priors = lab
    reader = InnerLoop(model, score, rule or SGD(0.5), priors, ReadConfig(**{"segment": 8, **config}))
    found = kind.over(reader, scorer, cache)
    if kind is MixedReader:
        found.mixture = mixture_of(found.still is not None, cache is not None)
    return found


def read(reader, *articles):
    with reader:
        reader.begin()
        return [reader.read(article, START) for article in articles]


@pytest.mark.parametrize(("make", "scorer"), LABS)
@pytest.mark.parametrize("cache", [CACHE, None])
@pytest.mark.parametrize("rule", [Static, lambda: SGD(0.5)])
def test_scores_are_the_weighted_sum_of_what_each_memory_predicts(make, scorer, cache, rule):
    lab, article, whole = make(), make_article(43), CacheConfig(weight=1 - 1e-12, theta=2.0, window=11)
    model, score, priors = lab
    if cache is None and not rule().reads_gradient:
        with pytest.raises(InputError, match="makes one prediction: there is nothing to mix"):
            mixed(lab, rule(), cache, scorer)
        return
    (found_T,) = read(reader := mixed(lab, rule(), cache, scorer), article)
    recorder = mixed(lab, rule(), cache, scorer, kind=SourceRecorder)
    (adapted_T,) = read(recorder, article)
    config = ReadConfig(segment=8)
    parts = [adapted_T]
    if rule().reads_gradient:
        parts.insert(0, read(InnerLoop(model, score, Static(), priors, config), article)[0])
    if cache:
        beside = CachedReader.beside(InnerLoop(model, score, rule(), priors, config), whole)
        parts.append(read(beside, article)[0])
    weights_TK = torch.cat([reader.mixture(sources) for sources in recorder.parts]).exp()
    probs_TK = torch.stack(parts, 1).neg().exp()
    if cache:
        probs_TK[0, -1] = 0  # it is empty, and its weight is zero
        assert weights_TK[0, -1] == 0
    torch.testing.assert_close(weights_TK.sum(1), torch.ones(43))
    assert weights_TK[1:].std(0).min() > 1e-3
    expected_T = -(weights_TK * probs_TK).sum(1).log()
    torch.testing.assert_close(found_T, expected_T, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_the_rule_does_not_know_of_the_mixture():
    lab, article = make_lab(), make_article(60)
    plain, beside = (
        InnerLoop(*lab[:2], SGD(0.5), lab[2], ReadConfig(segment=8, reset="never")),
        mixed(lab, reset="never"),
    )
    with plain:
        plain.read(article, START)
        learned = [theta.clone() for theta in plain.thetas]
    with beside:
        beside.read(article, START)
        assert all(torch.equal(a, b) for a, b in zip(learned, beside.thetas, strict=True))


def test_running_means_hold_what_came_before_and_nothing_else():
    gains_SE = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    means = torch.zeros(len(DECAYS), 2)
    evidence = Evidence(means, 0)
    for part in (gains_SE[:3], gains_SE[3:]):
        found_SDE, evidence = running(evidence, part)
        for gain_E, found_DE in zip(part, found_SDE, strict=True):
            torch.testing.assert_close(found_DE, means)
            decays = torch.tensor(DECAYS)[:, None]
            means = decays * means + (1 - decays) * gain_E
    torch.testing.assert_close(evidence.means_DE, means)
    assert evidence.tokens == 7


@pytest.mark.parametrize(("make", "scorer"), LABS)
def test_it_passes_the_audit(make, scorer):
    lab = make(torch.float32)
    a, b = (excerpt(make_article(300, seed, id), 8) for seed, id in ((1, "A"), (2, "B")))
    found = audit(lambda: mixed(lab, scorer=scorer), a, b, START, VOCAB)
    assert [verdict for verdict in found if not verdict.passed] == []


def test_a_snapshot_holds_all_that_it_remembers():
    reader, pieces = mixed(make_lab()), make_article(49).ids_T.split(7)
    with reader:
        for ids in pieces[:3]:
            reader.segment(ids, ids)
        kept = reader.snapshot()
        once = reader.segment(pieces[3], pieces[4]).losses_S
        reader.segment(pieces[5], pieces[5])
        reader.resume(kept)
        assert torch.equal(reader.segment(pieces[3], pieces[4]).losses_S, once)


def test_it_is_reset_like_the_weights():
    alone, after = read(mixed(make_lab()), make_article(40, seed=1), make_article(40, seed=1))
    assert torch.equal(alone, after)


def sources_of(size, informed, seed=0):
    """Two sources of which one knows the token, as the first feature says, or does not say."""
    generator = torch.Generator().manual_seed(seed)
    features_SF = torch.randn(size, 3, generator=generator)
    hint_S = features_SF[:, 0] if informed else torch.randn(size, generator=generator)
    log_probs_SK = torch.full((size, 2), math.log(0.1))
    log_probs_SK[torch.arange(size), (hint_S > 0).long()] = math.log(0.5)
    return Sources(log_probs_SK, features_SF, torch.zeros(size, 2, dtype=torch.bool))


@pytest.mark.parametrize(("informed", "expected"), [(True, -math.log(0.5)), (False, -math.log(0.3))])
def test_the_fit_finds_what_the_features_tell_and_nothing_where_they_tell_nothing(informed, expected, monkeypatch):
    recorded = [sources_of(600, informed, seed) for seed in range(8)]
    monkeypatch.setattr("dynlm.evaluation.mixture_fit.record", lambda *_: recorded)
    passes = []
    fitted = fit_mixture(None, [None] * 8, START, progress=lambda: passes.append(1))
    assert fitted.weights == pytest.approx([0.5, 0.5], abs=0.05)
    assert fitted.constant == pytest.approx(-math.log(0.3), abs=0.01)
    assert fitted.nats_per_token == pytest.approx(expected, abs=0.05)
    assert fitted.nats_per_token <= fitted.constant
    assert len(passes) >= fitted.passes
    again = fit_mixture(None, [None] * 8, START)
    assert all(torch.equal(a, b) for a, b in zip(fitted.mixture.parameters(), again.mixture.parameters(), strict=True))


def test_constant_weights_are_the_best_ones():
    sources = sources_of(500, informed=False)
    sources.log_probs_SK[:, 0] += math.log(1.5)
    weights_K = constant_weights(sources)

    def loss(weight):
        both = torch.tensor([weight, 1 - weight]).log()
        return -float((both + sources.log_probs_SK).logsumexp(1).mean())

    assert float(weights_K.sum()) == pytest.approx(1)
    assert all(loss(float(weights_K[0])) <= loss(float(weights_K[0]) + step) + 1e-7 for step in (-0.05, 0.05))


def test_what_was_fitted_is_what_reading_scores(tmp_path):
    lab = make_lab(torch.float32)
    articles = [make_article(200, seed) for seed in range(8)]
    recorder = mixed(lab, kind=SourceRecorder)
    fitted = fit_mixture(recorder, articles, START)
    assert fitted.nats_per_token <= fitted.constant
    save_mixture(fitted.mixture, tmp_path / "m.safetensors", {})
    reader = mixed(lab)
    reader.mixture = load_mixture(tmp_path / "m.safetensors", learns=True, cached=True)
    found = read_articles(reader, articles[6:], START)
    assert found.nats / 400 == pytest.approx(fitted.nats_per_token, abs=1e-5)
    with pytest.raises(InputError, match="fit it again"):
        load_mixture(tmp_path / "m.safetensors", learns=False, cached=True)
    with pytest.raises(InputError, match=r"give at least 4"):
        fit_mixture(recorder, articles[:3], START)


def test_a_reader_without_a_network_says_so():
    reader = mixed(make_lab())
    reader.mixture = None
    with reader, pytest.raises(InputError, match="fit one"):
        reader.read(make_article(9), START)
    assert reader.evidence.tokens == 8  # of the segment that it refused
