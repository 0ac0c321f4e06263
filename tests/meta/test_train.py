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
from dynlm.processes import rank
from dynlm.runs import Run
from dynlm.types import InputError
from lab import START, make_article, make_lab
from support.together import together

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
    with pytest.raises(InputError, match=r"meta-gradient is nan at step 0: lower lr"):
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
    with pytest.raises(InputError, match="give at least 2"):
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


@pytest.mark.parametrize("estimator", [EstimatorConfig(coordinates=300), EstimatorConfig("pes")], ids=lambda e: e.kind)
def test_two_processes_learn_what_one_learns_bit_for_bit(tmp_path, estimator):
    config = replace(
        CONFIG, steps=3, articles=3, truncation=20, estimator=estimator
    )  # streams end, and others take their place

    def work():
        trainer, validate = make_trainer(config)
        progress = meta_train(trainer, validate, Run(tmp_path), lambda *_: None)
        return phi(trainer), progress.best, [stream.article for stream in trainer.streams], trainer.state()

    alone, (first, second) = work(), together(work)
    for found in (first, second):
        assert all(map(torch.equal, found[0], alone[0]))
        assert found[1:3] == alone[1:3]
    kept, whole = first[3], alone[3]
    assert kept[0].keys() == whole[0].keys()
    assert all(torch.equal(kept[0][name], whole[0][name]) for name in whole[0])
    assert kept[1]["streams"] == whole[1]["streams"]


def test_another_number_of_processes_resumes_exactly(tmp_path):
    def work(resume):
        trainer, validate = make_trainer(replace(CONFIG, steps=8) if resume else CONFIG)
        if not resume:
            step, steps = trainer.step, []

            def last_words():
                steps.append(step())
                if len(steps) == 6:
                    signal.raise_signal(signal.SIGINT)
                return steps[-1]

            trainer.step = last_words
        try:
            meta_train(trainer, validate, Run(tmp_path / "cut"), lambda *_: None, resume)
        except Interrupted as error:
            return str(error)
        return phi(trainer)

    said = "interrupted after step 6, which is saved: --resume goes on from there"
    assert together(lambda: work(False)) == [said] * 2
    straight, validate = make_trainer()
    meta_train(straight, validate, Run(tmp_path / "straight"), lambda *_: None)
    assert all(map(torch.equal, work(True), phi(straight)))


def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path):
    def work():
        trainer, validate = make_trainer()
        if rank() == 1:
            validate = after(validate, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted) as caught:
            meta_train(trainer, validate, Run(tmp_path), lambda *_: None)
        return str(caught.value), caught.value.signal

    said = "interrupted after step 1, which is saved: --resume goes on from there"
    assert together(work) == [(said, signal.SIGTERM)] * 2


def after(function, more):
    def both():
        result = function()
        more()
        return result

    return both


def test_meta_gradients_of_two_processes_are_those_of_one():
    def work():
        model, score, priors = make_lab(torch.float64)
        reader = InnerLoop(model, score, start_rule("gated", WEAK, priors, hidden=4), priors, ReadConfig(segment=8))
        trainer = MetaTrainer(reader, ARTICLES, START, CONFIG)
        trainer.step()
        return [p.grad for p in trainer.phi]

    alone = work()
    for found in together(work):
        for grad, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)


def test_more_processes_than_articles_are_refused():
    def work():
        make_trainer(replace(CONFIG, articles=1))

    for error in together(work):
        assert str(error).startswith("meta.articles is 1, fewer than the 2 processes that would share them")


def test_the_rule_that_is_kept_is_the_running_mean_of_phi(tmp_path):
    config = replace(CONFIG, steps=3, validate_every=1, average=0.5)
    trainer, validate = make_trainer(config)
    means, seen = [phi(trainer)], []

    def look():
        seen.append(phi(trainer))
        return validate()

    step = trainer.step

    def step_and_average():
        loss = step()
        keep = min(0.5, (trainer.progress.step - 1) / (trainer.progress.step + 9))
        means.append([keep * m + (1 - keep) * p for m, p in zip(means[-1], phi(trainer), strict=True)])
        return loss

    trainer.step = step_and_average
    meta_train(trainer, look, Run(tmp_path), lambda *_: None)
    for mean, validated in zip(means, seen, strict=True):
        for a, b in zip(mean, validated, strict=True):
            torch.testing.assert_close(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(phi(trainer), seen[-1], strict=True))  # φ itself goes on


def test_without_a_mean_phi_itself_is_kept(tmp_path):
    trainer, validate = make_trainer(replace(CONFIG, steps=2, validate_every=1, average=0.0))
    meta_train(trainer, validate, Run(tmp_path), lambda *_: None)
    for a, b in zip(phi(trainer), trainer.mean.parameters(), strict=True):
        assert torch.equal(a, b)
