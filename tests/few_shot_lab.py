"""Small real pieces of the tests of learned starts: a network, sinusoid tasks and a reader."""

import torch

from dynlm.inner import InnerLoop, ReadConfig
from dynlm.labs.fewshot.nets import MLP, NetScorer, seeded, squared_error
from dynlm.labs.fewshot.tasks import Sinusoids
from dynlm.meta.initialisation import Task
from dynlm.models.params import adapted_parameters
from dynlm.optim.handmade import SGD
from dynlm.priors import make_priors

LR, DECAY = 0.05, 0.1


def make_reader(rule=None, net=None, seed=0):
    net = (net or seeded(lambda: MLP((1, 8, 8, 1)), seed)).double()
    adapted = adapted_parameters(net)
    priors = make_priors(adapted, [torch.ones_like(a.matrix_RC) for a in adapted])
    score = NetScorer(net, squared_error)
    return InnerLoop(net, score, rule or SGD(LR, DECAY), priors, ReadConfig(kernel="eager", trust=0))


def make_task(steps=3, seed=0):
    task = Sinusoids(shots=6, queries=7).sample(torch.Generator().manual_seed(seed))
    (x, y), (x2, y2) = task
    return Task.few_shot((x.double(), y.double()), (x2.double(), y2.double()), steps)


def flat(grads):
    return torch.cat([g.flatten() for g in grads])
