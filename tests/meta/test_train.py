"""Meta-training: it improves on its start, resumes exactly, and leaves φ alone when something breaks."""

import copy
import json
import signal
from dataclasses import replace

import pytest
import torch

from dynlm.evaluation.stream import read_articles
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.interrupt import Interrupted
from dynlm.meta.estimators import EstimatorConfig
from dynlm.meta.train import MetaConfig, MetaTrainer, divide_meta_split, meta_train
from dynlm.optim.library import start_rule
from dynlm.optim.registry import trained
from dynlm.runs import Run
from dynlm.types import InputError
from lab import START, make_article, make_lab

CONFIG = MetaConfig(
    steps=8,
    articles=2,
    truncation=6,
    lr=3e-2,
    validate_every=4,
    validation_articles=2,
    estimator=EstimatorConfig(coordinates=300),
)
WEAK = {"lr": 3e-3, "eps": 1e-2, "decay": 1e-4}  # far from the best settings: there is something to gain
ARTICLES = [make_article(300, seed) for seed in range(6)]


def make_trainer(config=CONFIG, start=WEAK):
    model, score, priors = make_lab(torch.float32)
    rule = start_rule(config.rule, start, priors, hidden=4)
    reader = InnerLoop(model, score, rule, priors, ReadConfig(segment=8))
    train, valid = divide_meta_split(ARTICLES, config)
    trainer = MetaTrainer(reader, train, START, config)
    return trainer, lambda: read_articles(reader, valid, START).nats / sum(map(len, valid))


def phi(trainer):
    return [p.detach().clone() for p in trainer.rule.parameters()]


def test_meta_training_beats_its_start(tmp_path):
    trainer, validate = make_trainer(replace(CONFIG, steps=40, validate_every=10))
    start, kept = validate(), []
    progress = meta_train(
        trainer, validate, Run(tmp_path), lambda rule, p, new: kept.append((copy.deepcopy(rule), p.best))
    )
    assert progress.best < start - 0.05
    trainer.rule.load_state_dict(kept[-1][0].state_dict())
    assert validate() == pytest.approx(progress.best)


def test_an_interrupted_meta_training_resumes_exactly(tmp_path):
    straight, validate = make_trainer()
    meta_train(straight, validate, Run(tmp_path / "straight"), lambda *_: None)

    class StopError(Exception):
        pass

    cut, validate_cut = make_trainer()
    calls = []

    def stop_at_the_third():  # start, step 4 and its checkpoint, step 8
        calls.append(1)
        if len(calls) == 3:
            raise StopError
        return validate_cut()

    with pytest.raises(StopError):
        meta_train(cut, stop_at_the_third, Run(tmp_path / "cut"), lambda *_: None)
    resumed, validate_resumed = make_trainer()
    progress = meta_train(resumed, validate_resumed, Run(tmp_path / "cut"), lambda *_: None, resume=True)
    assert progress.step == 8
    assert all(torch.equal(a, b) for a, b in zip(phi(straight), phi(resumed), strict=True))


def test_it_stops_early_when_validation_no_longer_improves(tmp_path):
    trainer, _ = make_trainer(replace(CONFIG, steps=100, validate_every=1, patience=2))
    progress = meta_train(trainer, lambda: 3.0, Run(tmp_path), lambda *_: None)
    assert (progress.step, progress.stale) == (2, 2)


def test_streams_carry_on_and_then_take_a_fresh_article():
    trainer, _ = make_trainer(replace(CONFIG, articles=1, truncation=20))
    assert len(trainer.streams[0].pieces) == 38
    trainer.step()
    assert trainer.streams[0].done == 20
    assert trainer.streams[0].position is not None
    trainer.step()
    assert trainer.streams[0].done == 0
    assert trainer.streams[0].position is None


def test_a_meta_gradient_that_is_not_finite_leaves_phi(monkeypatch):
    trainer, _ = make_trainer()
    before = phi(trainer)

    def poisoned(recording):
        for p in trainer.rule.parameters():
            p.grad = torch.full_like(p, float("nan"))

    monkeypatch.setattr(trainer.estimator, "replay", poisoned)
    with pytest.raises(InputError, match=r"meta-gradient is nan at step 0: lower meta\.lr"):
        trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, phi(trainer), strict=True))


@pytest.mark.parametrize("kind", ["replay", "unroll", "forward", "pes"])
@pytest.mark.parametrize("rule", ["mlp", "gru"])
def test_every_estimator_resumes_exactly(rule, kind):
    config = replace(
        CONFIG, rule=rule, articles=1, estimator=EstimatorConfig(kind, coordinates=50, slices=(4,), pairs=1)
    )
    straight, _ = make_trainer(config)
    straight.step()
    tensors, meta = copy.deepcopy(straight.state())
    straight.step()
    resumed, _ = make_trainer(config)
    resumed.load(tensors, json.loads(json.dumps(meta)))
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(phi(straight), phi(resumed), strict=True))


@pytest.mark.parametrize("rule", trained())
def test_every_cell_gets_a_gradient_in_each_meta_parameter(rule):
    """After a first step, as output layers start at zero and let nothing through before."""
    trainer, _ = make_trainer(replace(CONFIG, rule=rule, articles=1), {**WEAK, "decay": 3e-2})
    for _ in range(3):
        trainer.step()
    for name, p in trainer.rule.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_a_foreign_checkpoint_is_refused():
    trainer, _ = make_trainer()
    trainer.step()
    tensors, meta = copy.deepcopy(trainer.state())
    with pytest.raises(InputError, match=r"other \[meta\] settings"):
        make_trainer(replace(CONFIG, lr=1.0))[0].load(tensors, meta)
    del tensors["rng"]
    with pytest.raises(InputError, match="does not fit this run"):
        make_trainer()[0].load(tensors, meta)


def test_the_meta_split_is_divided_without_overlap():
    train, valid = divide_meta_split(ARTICLES, CONFIG)
    assert (len(train), len(valid)) == (4, 2)
    assert not {id(a) for a in train} & {id(a) for a in valid}
    with pytest.raises(InputError, match="needs at least 2"):
        divide_meta_split(ARTICLES[:1], CONFIG)


@pytest.mark.parametrize("at", [3, 4])
def test_a_signal_leaves_no_validation_out(tmp_path, at):
    """Also where it comes in the step before a validation."""
    straight, validate = make_trainer()
    meta_train(straight, validate, Run(tmp_path / "straight"), lambda *_: None)
    cut, validate_cut = make_trainer()
    step = cut.step

    def interrupted():
        if cut.progress.step + 1 == at:
            signal.raise_signal(signal.SIGTERM)
        return step()

    cut.step = interrupted
    with pytest.raises(Interrupted, match=f"interrupted after step {at}, which is saved"):
        meta_train(cut, validate_cut, Run(tmp_path / "cut"), lambda *_: None)
    resumed, validate_resumed = make_trainer()
    meta_train(resumed, validate_resumed, Run(tmp_path / "cut"), lambda *_: None, resume=True)
    assert [record["step"] for record in resumed.records] == [4, 8]
    assert [r["valid"] for r in resumed.records] == [r["valid"] for r in straight.records]
    assert all(torch.equal(a, b) for a, b in zip(phi(straight), phi(resumed), strict=True))
