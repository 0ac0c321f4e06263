"""Known answers: meta-training on f(x) = x², where every number can be worked out by hand."""

import pytest
import torch
from torch import nn

from dynlm.inner import InnerLoop, ReadConfig
from dynlm.meta.estimators import EstimatorConfig, make_estimator
from dynlm.models.params import adapted_parameters
from dynlm.optim.base import Prior, Rule
from dynlm.optim.handmade import SGD, Static
from dynlm.optim.library import start_rule
from dynlm.optim.linear import Linear
from dynlm.optim.registry import trained

NOTHING = (torch.zeros(1), torch.zeros(1))  # a segment without text: the loss is a function of the weights alone
ESTIMATORS = {
    "replay": EstimatorConfig(coordinates=0),
    "unroll": EstimatorConfig("unroll", slices=(2,)),
    "forward": EstimatorConfig("forward", coordinates=0),
}


class Parabola(nn.Module):
    """f(x) = mean x², x₀ = 1."""

    def __init__(self, n=1):
        super().__init__()
        self.x = nn.Parameter(torch.ones(n, dtype=torch.float64))

    def score(self, inputs_S, targets_S, hidden):
        return self.x.square().mean()[None] * self.x.numel(), None


def make_reader(rule, n=1):
    model = Parabola(n)
    priors = [
        Prior(a.name, a.matrix_RC.clone(), torch.ones_like(a.matrix_RC), 1.0, 1.0) for a in adapted_parameters(model)
    ]
    return InnerLoop(
        model, model.score, rule if isinstance(rule, Rule) else rule(priors), priors, ReadConfig(kernel="eager")
    )


def meta_train(reader, kind, lr, windows):
    """Adam on φ over windows of so many segments, carried on; returns the position after them."""
    estimator = make_estimator(reader, ESTIMATORS[kind])
    optimizer = torch.optim.Adam([p for p in reader.rule.parameters() if p.numel()], lr=lr)
    for epoch in windows:
        position = estimator.begin()
        for length in epoch:
            optimizer.zero_grad()
            position = estimator.window(position, [NOTHING] * length, [1.0] * length).position
            optimizer.step()
    return position


def theta(position):
    return getattr(position, "snapshot", position).thetas[0]


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_two_unrolls_of_the_linear_rule(kind):
    """The first unroll moves nothing; Adam then makes both weights −0.01, and x + ½ shrinks by 0.98 a step."""
    reader = make_reader(Linear())
    x = theta(meta_train(reader, kind, 0.01, [[5, 5]]))
    torch.testing.assert_close(x.item(), 0.98**5 * 1.5 - 0.5, rtol=1e-7, atol=0)
    assert x.item() == pytest.approx(0.8559, abs=1e-4)
    assert x.square().item() == pytest.approx(0.7325327, abs=1e-6)


def test_a_zero_rule_never_moves():
    for rule in (Linear(), Static(), SGD(0.0)):
        reader = make_reader(rule)
        reader.begin()
        for _ in range(5):
            reader.segment(*NOTHING)
        assert reader.thetas[0].item() == 1.0


def test_the_linear_rule_converges():
    reader = make_reader(Linear())
    x = theta(meta_train(reader, "replay", 0.01, [[20] * 5] * 80))
    assert x.square().item() < 1e-5


def read_cost(reader, segments=12):
    reader.begin()
    return sum(reader.segment(*NOTHING).losses_S.mean().item() for _ in range(segments)) / segments


@pytest.mark.parametrize("name", trained())
def test_every_cell_trains_on_the_parabola(name):
    """From gradient descent at a fiftieth of the best rate; twelve steps at the start leave most of the cost."""
    settings = {"lr": 0.01, "eps": 1e-3, "decay": 1e-4}
    reader = make_reader(lambda priors: start_rule(name, settings, priors).double(), n=3)
    before = read_cost(reader)
    meta_train(reader, "replay", 0.05, [[12]] * 30)
    assert read_cost(reader) < 0.5 * before, (before, read_cost(reader))
