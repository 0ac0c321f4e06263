"""Running statistics are those of the plain loop, to the last bit, whatever an unroll computes again."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dynlm.inner import InnerLoop, Snapshot
from dynlm.meta.buffers import unchanged_buffers
from dynlm.meta.initialisation import _hessian
from dynlm.meta.unroll import Unroll, UnrollConfig
from dynlm.models.params import adapted_parameters
from dynlm.optim.handmade import SGD
from dynlm.priors import make_priors

GENERATOR = torch.Generator().manual_seed(1)
DATA = [(torch.randn(10, 6, generator=GENERATOR), torch.randint(3, (10,), generator=GENERATOR)) for _ in range(8)]
NETS = {
    "batchnorm": lambda: nn.BatchNorm1d(8),
    "cumulative average": lambda: nn.BatchNorm1d(8, momentum=None),
    "without weights": lambda: nn.BatchNorm1d(8, affine=False),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),  # its output needs its buffers
}


class Lab:
    """A network in training mode, and the rule that reads ``DATA`` with it."""

    def __init__(self, kind):
        torch.manual_seed(0)
        layers = nn.Linear(6, 8), NETS[kind](), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3)
        self.net, self.rule = nn.Sequential(*layers).double().train(), SGD(lr=0.3)
        self.adapted = adapted_parameters(self.net)
        self.priors = make_priors(self.adapted, [torch.ones_like(a.matrix_RC) for a in self.adapted])
        self.start = Snapshot([p.theta0.clone() for p in self.priors], self.rule.init(self.priors), None)
        torch.manual_seed(5)

    def score(self, x, y, hidden):
        return F.cross_entropy(self.net(x.double()), y, reduction="none"), None

    def unroll(self, **config):
        unroll = Unroll(self.score, self.rule, self.adapted, self.priors, UnrollConfig(**config))
        return unroll, unroll.run(self.start, DATA, [1.0] * len(DATA)).loss

    def buffers(self):
        return {name: buffer.clone() for name, buffer in self.net.named_buffers()}


def after_the_plain_loop(kind):
    lab = Lab(kind)
    reader = InnerLoop(lab.net, lab.score, lab.rule, lab.priors)
    reader.begin()
    for piece in DATA:
        reader.segment(*piece)
    return lab.buffers()


def close(found, expected):
    assert found.keys() == expected.keys() != set()
    for name, buffer in found.items():
        torch.testing.assert_close(buffer, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("slices", [(), (4,), (3,), (4, 2), (5, 3, 1)])
@pytest.mark.parametrize("kind", list(NETS))
def test_each_batch_counts_once(kind, slices, order):
    expected = after_the_plain_loop(kind)
    lab = Lab(kind)
    buffers = dict(lab.net.named_buffers())
    _, loss = lab.unroll(order=order, slices=slices)
    loss.backward()
    close(lab.buffers(), expected)
    assert all(buffer is buffers[name] for name, buffer in lab.net.named_buffers())  # others may hold them too
    plain = Lab(kind)
    plain.unroll(order=order)[1].backward()
    for parameter, other in zip(lab.rule.parameters(), plain.rule.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=0)


@pytest.mark.parametrize("order", [1, 2])
def test_going_back_twice_counts_no_batch_again(order):
    lab = Lab("batchnorm")
    _, loss = lab.unroll(order=order, slices=(4, 2))
    grads = [torch.autograd.grad(loss, list(lab.rule.parameters()), retain_graph=True, allow_unused=True) for _ in "ab"]
    close(lab.buffers(), after_the_plain_loop("batchnorm"))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_pass_that_only_measures_leaves_no_trace():
    lab = Lab("batchnorm")
    unroll, _ = lab.unroll()
    before = lab.buffers()
    unroll.cost(lab.start, DATA[0])
    close(lab.buffers(), before)
    reader = InnerLoop(lab.net, lab.score, lab.rule, lab.priors)
    product = _hessian(reader, DATA[:2])
    assert product(torch.ones(sum(p.numel() for p in lab.net.parameters()), dtype=torch.double)).isfinite().all()
    close(lab.buffers(), before)


def test_buffers_are_back_after_an_exception():
    net = nn.BatchNorm1d(6)
    twin = copy.deepcopy(net)

    def fail():
        with unchanged_buffers():
            net(DATA[0][0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    close(dict(net.named_buffers()), dict(twin.named_buffers()))
    net(DATA[0][0])  # no hook is left behind
    assert net.num_batches_tracked == 1
