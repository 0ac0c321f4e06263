"""Training tasks: the seed decides all, every family learns, scaled weights compute what they did before."""

import copy

import pytest
import torch

from dynlm.labs.fewshot.nets import seeded, squared_error
from dynlm.labs.general import tasks
from dynlm.labs.general.nets import Perceptron
from dynlm.labs.general.tasks import FAMILIES, HELD_OUT, TaskConfig, TaskScorer, sample_task
from dynlm.models.params import adapted_parameters, pointed
from dynlm.types import InputError


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def learn(task, steps, lr):
    """Losses on the held-out batches before and after some steps of Adam."""
    optimizer = torch.optim.Adam(task.net.parameters(), lr=lr)
    before = task.validate()
    for inputs, targets in task.pieces(steps, 0):
        losses_S, hidden = task.score(inputs, targets, None)
        assert hidden is None
        optimizer.zero_grad()
        losses_S.mean().backward()
        optimizer.step()
    return before, task.validate()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(family):
    task = sample_task(1, TaskConfig(families=(family,)))
    before, after = learn(task, 60, 3e-3 if family not in ("linear", "logistic") else 3e-2)
    assert after < before
    assert task.name == family
    assert 50 <= task.horizon <= 1000
    assert task.n_weights <= 40_000


@pytest.mark.parametrize("family", ["cnn-digits", "gru-text", "transformer-sequence", "linear"])
def test_the_seed_decides_a_task_and_global_generators_are_left_alone(family):
    config = TaskConfig(families=(family,))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = sample_task(3, config), sample_task(3, config), sample_task(4, config)
    pieces = [task.pieces(3, 7) for task in (one, again)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(flat(one.net), flat(again.net))
    assert one.horizon == again.horizon
    for ours, theirs in zip([*pieces[0], *one.valid], [*pieces[1], *again.valid], strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert one.validate() == again.validate() != other.validate()
    assert not torch.equal(one.pieces(1, 8)[0][0], pieces[0][0][0]), "another seed, other batches"


def test_families_horizons_and_augmentations_vary():
    sampled = [sample_task(seed) for seed in range(60)]
    assert len({task.name for task in sampled}) >= 9
    assert min(task.horizon for task in sampled) < 100 < 500 < max(task.horizon for task in sampled)
    factors = [task.score.factor for task in sampled]
    assert 5 < sum(factor != 1 for factor in factors) < 40
    assert 5 < sum(bool(task.score.scaled) for task in sampled) < 40
    plain = [sample_task(seed, TaskConfig(augment=False)) for seed in range(20)]
    assert all(task.score.factor == 1 and not task.score.scaled for task in plain)


def test_scaled_tensors_compute_the_same_at_the_start_and_have_scaled_gradients():
    net = seeded(lambda: Perceptron([3, 4, 2]), 0)
    original = copy.deepcopy(net)
    scales = [2.0, 1.0, 0.25, 4.0]
    with torch.no_grad():
        for p, scale in zip(net.parameters(), scales, strict=True):
            p.div_(scale)
    score, plain = TaskScorer(net, squared_error, 3.0, scales), TaskScorer(original, squared_error)
    inputs, targets = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 2)
    losses, expected = score(inputs, targets, None)[0], plain(inputs, targets, None)[0]
    torch.testing.assert_close(losses, 3 * expected)
    grads = torch.autograd.grad(losses.sum(), list(net.parameters()))
    for grad, scale, other in zip(
        grads, scales, torch.autograd.grad(expected.sum(), list(original.parameters())), strict=True
    ):
        torch.testing.assert_close(grad, 3 * scale * other)


def test_scaled_tensors_may_be_nodes_of_a_graph():
    task = next(t for t in map(sample_task, range(50)) if t.score.scaled and t.name.startswith("gru"))
    adapted = adapted_parameters(task.net)
    nodes = [1.0 * a.parameter for a in adapted]
    expected = task.score(*task.valid[0], None)[0].mean()
    with pointed(adapted, nodes):
        before = [place.owner._parameters[place.name] for place, _ in task.score.scaled]
        loss = task.score(*task.valid[0], None)[0].mean()
        after = [place.owner._parameters[place.name] for place, _ in task.score.scaled]
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, nodes))
    assert loss.item() == expected.item()
    assert all(isinstance(p, torch.nn.Parameter) for p in task.net.parameters())


def test_unknown_families_are_one_line():
    with pytest.raises(InputError, match=r"families names 'rnn': choose from mlp-digits, "):
        sample_task(0, TaskConfig(families=("rnn",)))


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_tasks_build_and_learn(name):
    task = HELD_OUT[name](0)
    assert (task.name, task.horizon) == (name, 1000)
    assert 50_000 < task.n_weights < 300_000, "larger than any of the family"
    assert torch.equal(flat(task.net), flat(HELD_OUT[name](0).net))
    before, after = learn(task, 10, 3e-3)
    assert after < before


def test_held_out_tasks_share_nothing_with_the_family():
    families = {type(sample_task(seed).net) for seed in range(40)}
    held_out = {type(build(0).net) for build in HELD_OUT.values()}
    assert not families & held_out
    assert tasks.HELD_OUT.keys().isdisjoint(FAMILIES)
