"""Meta-training on tasks: outcomes, antithetic pairs, what stays fixed, several processes, exact resume."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from dynlm.labs.general.tasks import TaskConfig, sample_task
from dynlm.labs.general.train import GeneralMetaConfig, GeneralTrainer, Rollout, meta_train_general, outcome, train_task
from dynlm.optim.general import General
from dynlm.optim.handmade import SGD
from dynlm.runs import Run
from dynlm.types import InputError
from support.together import together

FAMILY = TaskConfig(families=("linear", "logistic"), min_steps=20, max_steps=30)
CONFIG = GeneralMetaConfig(steps=4, pairs=3, validate_every=2, validation_tasks=3, family=FAMILY)


def test_outcome_is_lower_for_better_trainings_and_one_for_a_divergence():
    fast, slow = Rollout([1.0] + [0.1] * 30, False), Rollout([1.0] + [0.5] * 30, False)
    late = Rollout([1.0] * 15 + [0.1] * 16, False)
    assert outcome(fast) < outcome(late) < outcome(slow) < 0
    assert outcome(Rollout([1.0, 1e9], True)) == 1
    assert outcome(Rollout([1.0] + [1e9] * 30, False)) == 1
    scaled = Rollout([10 * x for x in fast.losses_T], False)
    assert outcome(scaled) == pytest.approx(outcome(fast))


def test_training_a_task_lowers_its_loss_and_a_divergence_is_seen():
    task = sample_task(3, replace(FAMILY, families=("logistic",)))
    first = task.validate()
    rollout = train_task(General(), task, 0)
    assert len(rollout.losses_T) == task.horizon
    assert not rollout.diverged
    assert task.validate() < first
    wild = train_task(SGD(1e20), sample_task(3, replace(FAMILY, families=("linear",))), 0)
    assert wild.diverged


def test_a_step_moves_what_is_not_fixed_alone():
    trainer = GeneralTrainer(General(), CONFIG)
    before = {name: p.detach().clone() for name, p in trainer.rule.named_parameters()}
    trainer.step()
    for name, p in trainer.rule.named_parameters():
        assert torch.equal(p, before[name]) == (name in CONFIG.fixed), name


def test_the_estimate_points_downhill():
    """A rate 64 times too low: every pair says that it should rise."""
    rule = General()
    with torch.no_grad():
        rule.rate[:2] -= 6
    trainer = GeneralTrainer(rule, replace(CONFIG, pairs=8, steps=40, sigma=0.3))
    before = trainer.rule.rate[:2].detach().clone()
    start = trainer.validate()
    for _ in range(6):
        trainer.step()
    assert trainer.rule.rate[:2].sum() > before.sum()
    assert trainer.validate() < start


def test_two_processes_learn_what_one_learns_bit_for_bit():
    def work():
        trainer = GeneralTrainer(General(), CONFIG)
        return trainer.step(), trainer.phi.tolist(), trainer.validate()

    assert together(work) == [work()] * 2


def test_it_resumes_exactly_and_saves_at_each_validation(tmp_path):
    class StopError(Exception):
        pass

    kept = []
    straight = GeneralTrainer(General(), CONFIG)
    meta_train_general(straight, Run(tmp_path / "straight"), lambda rule, progress, new: kept.append(progress))
    assert [progress.step for progress in kept] == [0, 2, 4]
    assert kept[-1].best == min(progress.best for progress in kept)
    cut, validate = GeneralTrainer(General(), CONFIG), GeneralTrainer.validate

    def stop_at_the_third(self):
        if self.progress.step == 4:
            raise StopError
        return validate(self)

    cut.validate = stop_at_the_third.__get__(cut)
    with pytest.raises(StopError):
        meta_train_general(cut, Run(tmp_path / "cut"), lambda *_: None)
    resumed = GeneralTrainer(General(), CONFIG)
    progress = meta_train_general(resumed, Run(tmp_path / "cut"), lambda *_: None, resume=True)
    assert progress.step == 4
    assert torch.equal(straight.phi, resumed.phi)
    logs = [Run(tmp_path / name).log("learn-optimizer").read_text().splitlines() for name in ("straight", "cut")]
    records = [[json.loads(line) | {"seconds": 0} for line in log] for log in logs]
    assert [record["step"] for record in records[0]] == [0, 2, 4]
    assert records[0] == records[1]
    other = GeneralTrainer(General(), replace(CONFIG, sigma=0.2))
    with pytest.raises(InputError, match=r"other \[general\] settings"):
        meta_train_general(other, Run(tmp_path / "cut"), lambda *_: None, resume=True)


def test_checkpoints_of_earlier_versions_are_read_and_broken_ones_refused():
    straight, resumed = GeneralTrainer(General(), CONFIG), GeneralTrainer(General(), CONFIG)
    straight.step()
    tensors, meta = copy.deepcopy(straight.state())
    resumed.load({name.replace("optimizer.0.", "optimizer."): tensor for name, tensor in tensors.items()}, meta)
    assert straight.step() == resumed.step()
    assert torch.equal(straight.phi, resumed.phi)
    del tensors["phi"]
    with pytest.raises(InputError, match="does not fit this run"):
        GeneralTrainer(General(), CONFIG).load(tensors, meta)
