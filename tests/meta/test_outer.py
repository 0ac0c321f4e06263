"""The outer loop over starts: it lowers the loss after adaptation, keeps the best start and repeats itself."""

import dataclasses

import pytest
import torch

from dynlm.labs.fewshot.tasks import Sinusoids
from dynlm.meta.initialisation import METHODS, Task, outer_gradient
from dynlm.meta.outer import OuterConfig, learn_start
from dynlm.optim.handmade import SGD
from dynlm.types import DivergedError, InputError
from few_shot_lab import flat, make_reader, make_task
from support.together import together


def learn(method, config, seed=0, rule=None):
    """(reader, progress) after learning a start for sinusoids from a fixed seed."""
    reader = make_reader(rule or SGD(0.02, 0.02), seed=1)
    source, generator = Sinusoids(5, 10), torch.Generator().manual_seed(seed)

    def sample():
        support, query = ((x.double(), y.double()) for x, y in source.sample(generator))
        return Task.few_shot(support, query, 2)

    valid = [make_task(2, seed) for seed in range(20, 26)]

    def validate():
        return sum(outer_gradient("fomaml", reader, task).loss for task in valid)

    return reader, learn_start(method, reader, sample, config, validate)


@pytest.mark.parametrize("method", METHODS)
def test_learning_a_start_lowers_the_loss_after_adaptation(method):
    reader, progress = learn(method, OuterConfig(steps=20, tasks=2, lr=1e-2, validate_every=10))
    assert progress.best < 0.97 * progress.valid[0][1]
    assert progress.best == min(value for _, value in progress.valid)
    assert [step for step, _ in progress.valid] == [0, 10, 20]
    weights = [a.matrix_RC for a in reader.adapted]
    assert all(torch.equal(w, p.theta0) for w, p in zip(weights, reader.priors, strict=True))


def test_same_seed_same_start_and_other_seed_another():
    config = OuterConfig(steps=5, tasks=2, validate_every=5)
    starts = [flat([p.theta0 for p in learn("fomaml", config, seed)[0].priors]) for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_start_and_rate_are_learned_together():
    config = OuterConfig(steps=15, tasks=2, lr=1e-2, phi_lr=3e-3, validate_every=15)
    reader, joint = learn("maml", config, rule=SGD(0.001))
    assert 0.001 < reader.rule.lr.item() < 0.1
    alone = learn("maml", dataclasses.replace(config, phi_lr=0.0), rule=SGD(0.001))[1]
    assert joint.best < 0.99 * alone.best
    with pytest.raises(InputError, match="phi_lr 0"):
        learn("reptile", config)


def test_reptile_with_sgd_steps_part_of_the_way():
    """θ0 ← θ0 + ε (θ_k − θ0), in place."""
    reader, task = make_reader(), make_task(4)
    start = flat([p.theta0 for p in reader.priors])
    moved = flat(outer_gradient("reptile", reader, task).grads)
    config = OuterConfig(steps=1, tasks=1, optimizer="sgd", lr=0.25, schedule="constant", validate_every=1)
    learn_start("reptile", reader, lambda: task, config, iter([1.0, 0.0]).__next__)
    torch.testing.assert_close(flat([p.theta0 for p in reader.priors]), start - 0.25 * moved, rtol=1e-12, atol=1e-14)


def test_the_best_start_is_kept_not_the_last():
    reader, task = make_reader(), make_task(4)
    seen = []

    def validate():
        seen.append(flat([p.theta0 for p in reader.priors]).clone())
        return [3.0, 1.0, 2.0][len(seen) - 1]

    config = OuterConfig(steps=2, tasks=1, validate_every=1)
    progress = learn_start("fomaml", reader, lambda: task, config, validate)
    assert (progress.best, progress.best_step) == (1.0, 1)
    assert torch.equal(flat([p.theta0 for p in reader.priors]), seen[1])


def test_a_loop_that_runs_away_keeps_what_was_learned(monkeypatch):
    from dynlm.meta import outer

    config = OuterConfig(steps=20, tasks=2, lr=1e-2, validate_every=2)
    calls, step = [], outer._outer_step

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise DivergedError("outer loss is inf")
        return step(*arguments)

    monkeypatch.setattr(outer, "_outer_step", failing)
    _, progress = learn("fomaml", config)
    assert progress.restarts == ["step 7: outer loss is inf"]
    assert len(progress.train_losses) == 19
    assert progress.valid[-1][0] == 20
    monkeypatch.setattr(outer, "_outer_step", lambda *_: failing_at_once())
    with pytest.raises(InputError, match="at once"):
        learn("fomaml", config)


def test_a_restart_takes_up_the_best_start_with_half_the_rate(monkeypatch):
    from dynlm.meta import outer

    rates, starts, step = [], [], outer._outer_step

    def spying(method, reader, sample, config, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        starts.append([prior.theta0.clone() for prior in reader.priors])
        if len(rates) == 4:
            raise DivergedError("outer loss is inf")
        return step(method, reader, sample, config, optimizer)

    monkeypatch.setattr(outer, "_outer_step", spying)
    learn("fomaml", OuterConfig(steps=6, tasks=2, lr=1e-2, validate_every=100, schedule="constant"))
    assert rates == [1e-2] * 4 + [5e-3] * 2
    assert all(torch.equal(a, b) for a, b in zip(starts[4], starts[0], strict=True))


def failing_at_once():
    raise InputError("at once")


@pytest.mark.parametrize("method", ["maml", "fomaml", "reptile"])
def test_two_processes_learn_the_start_of_one_bit_for_bit(method):
    config = OuterConfig(steps=4, tasks=3, validate_every=2, phi_lr=3e-3 if method == "maml" else 0.0)

    def work():
        reader, progress = learn(method, config)
        return [p.theta0 for p in reader.priors], list(reader.rule.state_dict().values()), progress

    theta0, phi, progress = work()
    for found in together(work):
        assert all(map(torch.equal, found[0], theta0))
        assert all(map(torch.equal, found[1], phi))
        assert found[2] == progress
