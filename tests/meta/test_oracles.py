"""The unroll engine against two implementations that share nothing with it, of first and of second order."""

import pytest
import torch

from dynlm.data.segments import article_segments
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.meta.unroll import Unroll, UnrollConfig
from dynlm.models.core import LSTMScorer
from lab import START, TransformerScorer, make_article, make_lab, make_transformer_lab
from support.oracles import ORACLES, Work
from support.rules import READING, make
from support.windows import SEGMENT

LABS = {"lstm": (make_lab, LSTMScorer), "transformer": (make_transformer_lab, TransformerScorer)}


@pytest.fixture(scope="module", params=LABS)
def lab(request):
    make, scorer = LABS[request.param]
    return *make(), scorer


def make_work(lab, rule, order, n_segments=5):
    """A window two segments into an article: fast weights, the rule's memory and hidden state are in use."""
    model, score, priors, scorer = lab
    pieces = list(article_segments(make_article(SEGMENT * (n_segments + 2), seed=3).ids_T, START, SEGMENT))
    with InnerLoop(model, score, rule, priors, ReadConfig(segment=SEGMENT, kernel="eager")) as reader:
        for piece in pieces[:2]:
            reader.segment(*piece)
        start = reader.snapshot()
        adapted = reader.adapted
    start = start._replace(thetas=[theta.requires_grad_() for theta in start.thetas])
    weights = [0.1 + 0.05 * t for t in range(n_segments)]
    return Work(model, scorer, rule, adapted, priors, start, pieces[2:], weights, order)


def meta_gradients(work, loss):
    """By name: of φ, and of θ at the window's start."""
    wanted = dict(work.rule.named_parameters())
    wanted |= {f"start of {a.name}": theta for a, theta in zip(work.adapted, work.start.thetas, strict=True)}
    grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    return dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", READING)
def test_unroll_equals_the_oracles(name, order, lab):
    work = make_work(lab, make(name, lab[2]), order)
    expected = {oracle: loss(work) for oracle, loss in ORACLES.items()}
    expected_gradients = {oracle: meta_gradients(work, loss) for oracle, loss in expected.items()}
    for fused in (True, False):
        config = UnrollConfig(order=order, fused=fused)
        unroll = Unroll(lab[1], work.rule, work.adapted, work.priors, config)
        loss = unroll.run(work.start, work.pieces, work.weights).loss
        actual = meta_gradients(work, loss)
        for oracle in ORACLES:
            assert loss.item() == pytest.approx(expected[oracle].item(), rel=1e-12), oracle
            for key, value in expected_gradients[oracle].items():
                message = f"{oracle}, fused {fused}, {key}: {{}}".format
                torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-12, msg=message)
