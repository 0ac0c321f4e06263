"""Tuning: better than the start, the same twice, honest about its edges."""

from dataclasses import replace

import pytest
import torch

from dynlm.evaluation.cache_search import tune_cache
from dynlm.evaluation.stream import read_articles
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.meta.tune import TuneConfig, tune_rule
from dynlm.optim.library import make_rule
from dynlm.optim.registry import DECAY, RULES, tuned
from dynlm.types import DivergedError, InputError
from lab import START, make_article, make_lab
from support.together import together

ARTICLES = [make_article(150, seed) for seed in range(3)]
CONFIG = TuneConfig(trials=14, articles=2, max_tokens=100)


@pytest.fixture(scope="module")
def reader_for():
    model, score, priors = make_lab(torch.float32)
    return lambda rule: InnerLoop(model, score, rule, priors, ReadConfig(segment=8))


@pytest.mark.parametrize("kind", tuned())
def test_tuned_settings_beat_static_and_are_repeatable(kind, reader_for):
    texts = [type(a)(a.id, a.title, a.ids_T[:100], 0, 0) for a in ARTICLES[:2]]
    static = read_articles(reader_for(make_rule("static")), texts, START).nats / 200
    calls = []
    tuned = tune_rule(kind, reader_for, ARTICLES, START, CONFIG, lambda: calls.append(1))
    assert tuned.nats_per_token < static - 0.01
    assert len(calls) == tuned.trials == 14
    assert read_articles(reader_for(tuned.rule), texts, START).nats / 200 == pytest.approx(tuned.nats_per_token)
    again = tune_rule(kind, reader_for, ARTICLES, START, CONFIG)
    assert again.rule.settings() == tuned.rule.settings()


def test_pattern_search_improves_on_the_random_half(reader_for):
    half = tune_rule("sgd", reader_for, ARTICLES, START, TuneConfig(trials=7, articles=2, max_tokens=100))
    full = tune_rule("sgd", reader_for, ARTICLES, START, CONFIG)
    assert full.nats_per_token <= half.nats_per_token


def test_settings_at_the_edge_are_named(reader_for, monkeypatch):
    space = RULES["sgd"].space
    low = space["lr"]._replace(low=1e-6, high=1e-5, start=5e-6)
    monkeypatch.setitem(RULES, "sgd", replace(RULES["sgd"], space={**space, "lr": low}))
    assert "lr" in tune_rule("sgd", reader_for, ARTICLES, START, CONFIG).at_bound


def test_errors(reader_for):
    with pytest.raises(InputError, match="'static' has no search space"):
        tune_rule("static", reader_for, ARTICLES, START, CONFIG)
    with pytest.raises(InputError, match="the meta split is empty"):
        tune_rule("sgd", reader_for, [], START, CONFIG)


def test_rates_go_down_until_reading_stays_finite(reader_for, monkeypatch):
    row, calm = RULES["sgd"], RULES["sgd"].space
    monkeypatch.setitem(RULES, "sgd", replace(row, space={**calm, "decay": DECAY.times(1e20)}))
    with pytest.raises(DivergedError, match=r"diverged at each of 4 settings, down to lr .*: more trials"):
        tune_rule("sgd", reader_for, ARTICLES, START, TuneConfig(trials=8, articles=2, max_tokens=100))
    monkeypatch.setitem(RULES, "sgd", replace(row, space={**calm, "lr": calm["lr"].times(1e3)}))
    tuned = tune_rule("sgd", reader_for, ARTICLES, START, CONFIG)
    static = read_articles(reader_for(make_rule("static")), CONFIG.excerpts(ARTICLES), START).nats / 200
    assert tuned.nats_per_token < static == tuned.static


def test_a_model_that_is_broken_blames_no_rule(reader_for):
    reader = reader_for(make_rule("static"))
    priors = [p._replace(theta0=p.theta0 * float("nan")) for p in reader.priors]

    def broken(rule):
        return InnerLoop(reader.model, reader.score, rule, priors, reader.config)

    with pytest.raises(DivergedError, match="before any update: the model"):
        tune_rule("sgd", broken, ARTICLES, START, CONFIG)


def test_two_processes_tune_what_one_tunes_bit_for_bit(reader_for):
    config = TuneConfig(trials=14, articles=5, max_tokens=100)

    def work():
        rule = tune_rule("rms", reader_for, ARTICLES, START, config)
        cache = tune_cache(reader_for(rule.rule), ARTICLES[:3], START)
        return rule._replace(rule=rule.rule.settings()), cache

    assert together(work) == [work()] * 2
