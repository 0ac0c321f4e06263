"""The neural cache against sums written out by hand, beside an LSTM, a transformer and any rule."""

import math

import pytest
import torch

from dynlm.evaluation.cache import CacheConfig, CachedReader, attend, load_cache, mix, save_cache
from dynlm.evaluation.cache_search import HiddenRecorder, best_weight, cache_probabilities, record, tune_cache
from dynlm.evaluation.stream import read_articles
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.models.tap import Tap
from dynlm.optim.handmade import SGD, Static
from dynlm.types import InputError
from lab import START, make_article, make_lab, make_transformer_lab

CACHE = CacheConfig(weight=0.3, theta=2.0, window=11)


def cached(lab, rule=None, cache=CACHE, **config):
    model, score, priors = lab
    return CachedReader.beside(
        InnerLoop(model, score, rule or Static(), priors, ReadConfig(**{"segment": 8, **config})), cache
    )


def read(reader, *articles):
    with reader:
        reader.begin()
        return [reader.read(article, START) for article in articles]


def by_hand(losses_T, states_TD, ids_T, cache):
    """Equation by equation, one token at a time."""
    mixed = []
    for t in range(len(ids_T)):
        seen = range(max(0, t - cache.window), t)
        scores = {i: math.exp(cache.theta * float(states_TD[t] @ states_TD[i])) for i in seen}
        p_vocab = math.exp(-float(losses_T[t]))
        if not scores:
            mixed.append(p_vocab)
            continue
        p_cache = sum(s for i, s in scores.items() if ids_T[i] == ids_T[t]) / sum(scores.values())
        mixed.append((1 - cache.weight) * p_vocab + cache.weight * p_cache)
    return -torch.tensor(mixed, dtype=torch.float64).log()


@pytest.mark.parametrize("make", [make_lab, make_transformer_lab])
@pytest.mark.parametrize("segment", [8, 5])
@pytest.mark.parametrize("rule", [Static, lambda: SGD(0.5)])
def test_the_mixture_is_that_of_the_paper(make, segment, rule):
    lab, article = make(), make_article(43)
    model, score, priors = lab
    recorder = HiddenRecorder.of(InnerLoop(model, score, rule(), priors, ReadConfig(segment=segment)))
    (losses_T,) = read(recorder, article)
    states_TD = recorder.recording().states_TD.double()
    assert states_TD.shape == (43, model.get_output_embeddings().weight.shape[1])
    (mixed_T,) = read(cached(lab, rule(), segment=segment), article)
    torch.testing.assert_close(mixed_T, by_hand(losses_T, states_TD, article.ids_T, CACHE), rtol=1e-6, atol=1e-6)


def test_states_are_those_that_the_logits_are_read_out_from():
    for model, score, _ in (make_lab(layers=2), make_transformer_lab()):
        ids_T = make_article(9).ids_T
        with Tap(model) as tap:
            score(ids_T[:-1], ids_T[1:], None)
        torch.testing.assert_close(model.get_output_embeddings()(tap.states(8)), tap.logits(8))
        assert not model._forward_hooks


def test_the_rule_does_not_know_of_the_cache():
    lab, article = make_lab(), make_article(60)
    plain, beside = InnerLoop(*lab[:2], SGD(0.5), lab[2], ReadConfig(segment=8, reset="never")), cached(lab, SGD(0.5))
    beside.config = plain.config
    with plain:
        plain.read(article, START)
        learned = [theta.clone() for theta in plain.thetas]
    with beside:
        beside.read(article, START)
        assert all(torch.equal(a, b) for a, b in zip(learned, beside.thetas, strict=True))


def test_no_weight_is_no_cache_bitwise():
    lab, article = make_lab(torch.float32), make_article(40)
    (without,) = read(InnerLoop(*lab[:2], SGD(0.5), lab[2], ReadConfig(segment=8)), article)
    assert torch.equal(read(cached(lab, SGD(0.5), CacheConfig(weight=0.0)), article)[0], without)


def test_the_cache_is_reset_like_the_weights():
    lab = make_lab()
    first, second = make_article(40, seed=1), make_article(40, seed=1)
    alone, after = read(cached(lab), first, second)
    assert torch.equal(alone, after)
    model, score, priors = lab
    recorder = HiddenRecorder.of(InnerLoop(model, score, Static(), priors, ReadConfig(segment=8, reset="never")))
    losses_T = torch.cat(read(recorder, first, second))
    states_TD, ids_T = recorder.recording().states_TD.double(), torch.cat([first.ids_T, second.ids_T])
    stream_T = torch.cat(read(cached(lab, reset="never"), first, second))
    torch.testing.assert_close(stream_T, by_hand(losses_T, states_TD, ids_T, CACHE), rtol=1e-6, atol=1e-6)


def test_a_snapshot_holds_the_cache():
    reader, pieces = cached(make_lab(), SGD(0.5)), make_article(49).ids_T.split(7)
    with reader:
        for ids in pieces[:3]:
            reader.segment(ids, ids)
        kept = reader.snapshot()
        once = reader.segment(pieces[3], pieces[4]).losses_S
        reader.segment(pieces[5], pieces[5])
        reader.resume(kept)
        assert torch.equal(reader.segment(pieces[3], pieces[4]).losses_S, once)


def test_large_scores_and_impossible_tokens_stay_finite():
    dots_SM = torch.tensor([[0.0, 0.0], [1e4, 0.0], [-1e4, 1e4]])
    attention = attend(torch.cat([dots_SM, torch.zeros(3, 1)], 1), torch.tensor([1, 2, 1]), theta=3.0, window=5)
    assert attention.of_targets(torch.tensor([1, 1, 2])).tolist() == [0.0, 1.0, 1.0]
    mixed = mix(torch.full((3,), -200.0), attention.of_targets(torch.tensor([1, 2, 1])), attention.empty_S, 0.5)
    assert mixed.tolist() == pytest.approx([-200.0, -200 - math.log(2), -200 - math.log(2)])


def test_the_recorded_search_scores_as_reading_does(tmp_path):
    lab = make_lab()
    articles = [make_article(300, seed) for seed in range(2)]
    reader = InnerLoop(*lab[:2], SGD(0.3), lab[2], ReadConfig(segment=8))
    seen: list[int] = []
    tuned = tune_cache(reader, articles, START, lambda: seen.append(1))
    assert len(seen) == tuned.trials
    assert tuned.nats_per_token < tuned.nats_without
    found = read_articles(CachedReader.beside(reader, tuned.cache), articles, START)
    assert found.nats / 600 == pytest.approx(tuned.nats_per_token, abs=1e-5)
    for weight in (tuned.cache.weight * 0.7, tuned.cache.weight * 1.3):
        other = CacheConfig(weight, tuned.cache.theta, tuned.cache.window)
        assert read_articles(CachedReader.beside(reader, other), articles, START).nats > found.nats
    save_cache(tuned.cache, tmp_path / "cache", {})
    assert load_cache(tmp_path / "cache") == tuned.cache


def test_chunks_of_the_search_see_across_their_borders(monkeypatch):
    lab, article = make_lab(), make_article(90)
    streams = record(InnerLoop(*lab[:2], Static(), lab[2], ReadConfig(segment=8)), [article], START)
    whole = cache_probabilities(streams, [(1.0, 20), (0.5, 500)])
    monkeypatch.setattr("dynlm.evaluation.cache_search.CHUNK", 7)
    for a, b in zip(whole, cache_probabilities(streams, [(1.0, 20), (0.5, 500)]), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_a_useless_cache_gets_no_weight():
    losses_T = torch.tensor([0.5, 1.0, 1.5]).double()
    assert best_weight(losses_T, torch.zeros(3)) == (0.0, 1.0)
    weight, nats = best_weight(losses_T, torch.tensor([math.nan, 1.0, 0.0]))
    assert 0 < weight < 1
    assert nats < 1.0


@pytest.mark.parametrize(
    ("settings", "message"), [({"weight": 1.0}, "below 1"), ({"theta": -1.0}, "theta"), ({"window": 0}, "window")]
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        CacheConfig(**settings)


def test_a_model_that_shows_nothing_is_named(tmp_path):
    model, _, priors = make_lab()

    def score(inputs_S, targets_S, hidden):
        return model.lm_head.weight[targets_S].square().sum(1), None

    with pytest.raises(InputError, match="shows no hidden states"):
        read(cached((model, score, priors)), make_article(8))
    from dynlm.optim.sharing import save_rule

    save_rule(SGD(), tmp_path / "sgd")
    with pytest.raises(InputError, match="holds no settings of a cache"):
        load_cache(tmp_path / "sgd")
