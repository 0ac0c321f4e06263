"""The few-shot networks: shapes, normalisation, second derivatives, seeds."""

import pytest
import torch
from torch.autograd import gradgradcheck

from dynlm.labs.fewshot.nets import MLP, ConvNet, NetScorer, Normalise, cross_entropy, seeded, squared_error


@pytest.mark.parametrize("side", [16, 20, 28])
@pytest.mark.parametrize("normalise", ["batch", "image"])
def test_conv_net_gives_one_score_a_way(side, normalise):
    net = ConvNet(ways=3, width=4, normalise=normalise)
    assert net(torch.rand(6, 1, side, side)).shape == (6, 3)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()) == 4
    assert list(net.buffers()) == [], "statistics must not be carried from task to task"


@pytest.mark.parametrize(("kind", "alone"), [("image", True), ("batch", False)])
def test_image_statistics_look_at_each_image_alone_and_batch_statistics_do_not(kind, alone):
    images = torch.rand(5, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    net = seeded(lambda: ConvNet(width=4, normalise=kind), 0)
    assert torch.allclose(net(images)[:2], net(images[:2]), atol=1e-5) is alone


@pytest.mark.parametrize("kind", ["batch", "image"])
def test_normalised_features_have_mean_0_and_variance_1(kind):
    x_BCHW = 3 + 2 * torch.rand(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    y_BCHW = Normalise(6, kind)(x_BCHW)
    axes = (0, 2, 3) if kind == "batch" else (1, 2, 3)
    torch.testing.assert_close(y_BCHW.mean(axes), torch.zeros(y_BCHW.mean(axes).shape), atol=1e-5, rtol=0)
    variance = y_BCHW.var(axes, correction=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["batch", "image"])
def test_conv_net_has_second_derivatives(kind):
    net = seeded(lambda: ConvNet(width=2, blocks=2, ways=2, normalise=kind), 0).double()
    images = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score, labels = NetScorer(net, cross_entropy), torch.tensor([0, 1])
    weight = net.features[0].weight

    def loss(w):
        parameters = {"features.0.weight": w}
        return cross_entropy(torch.func.functional_call(net, parameters, images), labels).sum()

    assert torch.equal(loss(weight), score(images, labels, None)[0].sum())
    assert gradgradcheck(loss, (weight.detach().clone().requires_grad_(),), rtol=1e-3, atol=1e-5)


def test_losses_are_one_an_example():
    outputs, targets = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    assert squared_error(outputs, targets).tolist() == [2.0, 2.0]
    losses_B = cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, 3]))
    torch.testing.assert_close(losses_B, torch.full((3,), 4.0).log())
    losses, hidden = NetScorer(MLP((2, 3, 2)), squared_error)(outputs, targets, None)
    assert losses.shape == (2,)
    assert hidden is None


def test_mlp_is_the_papers():
    assert [tuple(p.shape) for p in MLP().parameters()] == [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]


def test_seed_decides_the_weights_and_leaves_the_global_one_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    nets = [seeded(MLP, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_stacked_copies_learn_their_own_tasks():
    """One inner loop over three copies is three inner loops, in every weight."""
    from dynlm.inner import InnerLoop, ReadConfig
    from dynlm.labs.fewshot.nets import StackedScorer, stacked
    from dynlm.models.params import adapted_parameters
    from dynlm.optim.handmade import SGD
    from dynlm.priors import make_priors

    def reader_of(net, score):
        parameters = adapted_parameters(net)
        priors = make_priors(parameters, [torch.ones_like(a.matrix_RC) for a in parameters])
        loop = InnerLoop(net, score, SGD(0.05), priors, ReadConfig(kernel="eager"))
        loop.begin()
        return loop

    net = seeded(lambda: MLP((1, 6, 6, 1)), 0).double()
    copies = stacked(net, 3)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 5, 1, generator=generator, dtype=torch.float64)
    targets = torch.randn(3, 5, 1, generator=generator, dtype=torch.float64)
    together = reader_of(copies, StackedScorer(copies, squared_error))
    for _ in range(4):
        together.segment(inputs, targets)
    alone = reader_of(net, NetScorer(net, squared_error))
    for k in range(3):
        alone.begin()
        for _ in range(4):
            alone.segment(inputs[k], targets[k])
        for stack, theta in zip(together.thetas, alone.thetas, strict=True):
            torch.testing.assert_close(stack[k], theta.flatten())
