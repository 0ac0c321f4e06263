"""Adaptation in tests, intervals over tasks, and the choice of a rate."""

import pytest
import torch

from dynlm.inner import InnerLoop, ReadConfig
from dynlm.labs.fewshot.evaluate import adapted, error_rate, mean_loss, mean_over_tasks, tune_rate
from dynlm.labs.fewshot.nets import MLP, NetScorer, seeded, squared_error
from dynlm.labs.fewshot.tasks import FewShotTask, Sinusoids
from dynlm.models.params import adapted_parameters
from dynlm.optim.handmade import SGD
from dynlm.priors import make_priors
from dynlm.types import DivergedError, InputError
from support.together import together


@pytest.fixture
def reader():
    net = seeded(lambda: MLP((1, 10, 1)), 0)
    parameters = adapted_parameters(net)
    priors = make_priors(parameters, [torch.ones_like(a.matrix_RC) for a in parameters])
    return InnerLoop(net, NetScorer(net, squared_error), SGD(0.02), priors, ReadConfig(kernel="eager", trust=0))


def test_each_task_starts_from_theta0_and_equals_torch_sgd(reader):
    generator = torch.Generator().manual_seed(0)
    tasks = [Sinusoids(5, 6).sample(generator) for _ in range(2)]
    values = adapted(reader, [*tasks, tasks[0]], 4, mean_loss)
    assert values[0] == values[2]
    net = seeded(lambda: MLP((1, 10, 1)), 0)
    sgd = torch.optim.SGD(net.parameters(), lr=0.02)
    for _ in range(4):
        sgd.zero_grad()
        squared_error(net(tasks[0].support[0]), tasks[0].support[1]).mean().backward()
        sgd.step()
    expected = squared_error(net(tasks[0].query[0]), tasks[0].query[1]).mean().item()
    assert values[0] == pytest.approx(expected, rel=1e-5)


def test_error_rate_counts_the_highest_score():
    class Fixed(torch.nn.Module):
        def forward(self, scores):
            return scores

    fixed = type("Stub", (), {"model": Fixed()})
    assert error_rate(fixed, (torch.eye(4), torch.tensor([0, 1, 0, 0]))) == 0.5


def test_mean_has_an_interval_that_covers_it():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    mean = mean_over_tasks(values)
    assert mean.value == pytest.approx(sum(values) / 400)
    assert mean.ci95[1] - mean.ci95[0] == pytest.approx(4 * 0.98 / 20, rel=0.15)
    assert mean.ci95[0] < mean.value < mean.ci95[1]


def test_rates_are_tried_upwards_until_reading_diverges():
    def mean_at(rate):
        if rate > 2:
            raise DivergedError("diverged")
        return (rate - 0.9) ** 2

    assert tune_rate([4.0, 0.5, 1.0, 2.0, 8.0], mean_at) == (1.0, pytest.approx(0.01), False)
    assert tune_rate([1.0, 2.0], mean_at).at_bound
    with pytest.raises(InputError, match="add smaller ones"):
        tune_rate([3.0, 4.0], mean_at)


def test_a_loss_that_is_not_finite_is_an_input_error(reader):
    x = torch.ones(3, 1)
    task = FewShotTask((x, x * float("inf")), (x, x))
    with pytest.raises(DivergedError, match="before any update: the model"):
        adapted(reader, [task], 1, mean_loss)


def test_two_processes_share_tasks_and_get_all_values(reader):
    tasks = [Sinusoids(5, 10).sample(torch.Generator().manual_seed(seed)) for seed in range(5)]

    def work():
        return adapted(reader, tasks, 2, mean_loss)

    assert together(work) == [work()] * 2
