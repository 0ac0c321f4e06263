"""The inner loop: score before update, carry, restore."""

import copy

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dynlm.data.segments import article_segments
from dynlm.evaluation.audit import first_leak, restores
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.models.core import LSTMScorer
from dynlm.optim.gated import Gated
from dynlm.optim.handmade import RMS, SGD, Static
from dynlm.priors import measure_priors
from dynlm.types import DivergedError, InputError, TokenizedArticle
from lab import START, VOCAB, make_article, make_lab

SETTINGS = {"lr": 3e-2, "eps": 1e-3, "decay": 1e-2}


def reader_for(lab, rule, **config):
    model, score, priors = lab
    return InnerLoop(model, score, rule, priors, ReadConfig(**{"segment": 8, **config}))


def read(lab, rule, article, **config):
    with reader_for(lab, rule, **config) as reader:
        return reader.read(article, START)


@pytest.mark.parametrize("segment", [1, 7, 50, 1000])
def test_static_reading_in_segments_equals_one_pass(segment):
    lab = make_lab(torch.float32)
    article = make_article(50)
    one_pass, _ = lab[1](torch.cat([torch.tensor([START]), article.ids_T[:-1]]), article.ids_T, None)
    torch.testing.assert_close(read(lab, Static(), article, segment=segment), one_pass.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: SGD(0.0), lambda: RMS(0.0, 1e-3, 0.0)])
@pytest.mark.parametrize("kernel", ["eager", "auto"])
def test_zero_rate_equals_static_bitwise(make, kernel):
    lab = make_lab(torch.float32)
    article = make_article(60)
    assert torch.equal(read(lab, make(), article, kernel=kernel), read(lab, Static(), article))


@pytest.mark.parametrize("position", [1, 8, 19, 30])
@pytest.mark.parametrize("rule", ["sgd", "rms", "gated"])
def test_scores_do_not_move_when_later_tokens_change(rule, position):
    lab = make_lab(torch.float32)
    rules = {"sgd": SGD(0.5), "rms": RMS(**SETTINGS), "gated": Gated.started_at(SETTINGS, lab[2])}
    reader = reader_for(lab, rules[rule])
    assert first_leak(reader, make_article(40), START, position, VOCAB) is None


def test_the_audit_finds_a_planted_leak():
    lab = make_lab(torch.float32)
    honest = lab[1]

    def peeking(inputs_S, targets_S, hidden):
        losses_S, hidden = honest(inputs_S, targets_S, hidden)
        return losses_S + 1e-3 * targets_S.roll(-1), hidden  # sees the next target

    reader = reader_for((lab[0], peeking, lab[2]), SGD(0.5))
    assert first_leak(reader, make_article(40), START, 20, VOCAB) == 19


def test_reading_learns_a_repeating_article_and_restores_every_bit():
    lab = make_lab(torch.float32)
    article = make_article(400)
    static, adapted = read(lab, Static(), article), read(lab, SGD(1.0), article)
    assert adapted[200:].mean() < static[200:].mean() - 0.2
    assert restores(reader_for(lab, SGD(1.0)), article, START)


def test_weights_are_restored_after_an_exception():
    lab = make_lab(torch.float32)
    saved = [p.clone() for p in lab[0].parameters()]

    def interrupted():
        with reader_for(lab, SGD(1.0)) as reader:
            reader.segment(torch.tensor([1, 2]), torch.tensor([2, 3]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(a, b) for a, b in zip(saved, lab[0].parameters(), strict=True))


def test_an_exploding_rule_is_one_clear_line_and_leaves_theta0():
    lab = make_lab(torch.float32)
    saved = [p.clone() for p in lab[0].parameters()]
    reader = reader_for(lab, SGD(1e30, 1e20))
    with pytest.raises(DivergedError, match=r"updates? by rule 'sgd': lower its lr"):
        reader.read(make_article(80), START)
    assert all(torch.equal(a, b) for a, b in zip(saved, lab[0].parameters(), strict=True))


def test_reset_never_carries_weights_over_articles_and_reset_article_does_not():
    lab = make_lab(torch.float32)
    first, second = make_article(60, seed=1), make_article(60, seed=2)
    alone = read(lab, SGD(0.5), second)
    for reset, same in (("article", True), ("never", False)):
        with reader_for(lab, SGD(0.5), reset=reset) as reader:
            reader.read(first, START)
            assert torch.equal(reader.read(second, START), alone) is same


def test_reset_never_is_one_stream():
    lab = make_lab(torch.float32)
    first, second = make_article(16, seed=1), make_article(16, seed=2)
    joined = TokenizedArticle("j", "j", torch.cat([first.ids_T, second.ids_T]), 0, 0)
    with reader_for(lab, SGD(0.5), reset="never") as reader:
        parts = torch.cat([reader.read(first, START), reader.read(second, int(first.ids_T[-1]))])
    assert torch.equal(parts, read(lab, SGD(0.5), joined))


def test_a_snapshot_goes_on_exactly():
    lab = make_lab(torch.float32)
    pieces = list(article_segments(make_article(64).ids_T, START, 8))
    with reader_for(lab, Gated.started_at(SETTINGS, lab[2])) as reader:
        for piece in pieces[:4]:
            reader.segment(*piece)
        saved = reader.snapshot()
        straight = [reader.segment(*piece).losses_S for piece in pieces[4:]]
        reader.resume(saved)
        again = [reader.segment(*piece).losses_S for piece in pieces[4:]]
    assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))


def test_only_the_chosen_parameters_move():
    model, score, _ = make_lab(torch.float32)
    globs = ("layers.*",)
    priors = measure_priors(model, score, article_segments(make_article(60).ids_T, START, 8), globs)
    assert [p.name for p in priors] == ["layers.0.weight_ih", "layers.0.weight_hh", "layers.0.bias"]
    before = model.embedding.weight.clone()
    reader = InnerLoop(model, score, SGD(0.5), priors, ReadConfig(params=globs, segment=8))
    with reader:
        for piece in article_segments(make_article(24).ids_T, START, 8):
            reader.segment(*piece)
        assert torch.equal(model.embedding.weight, before)
        assert not torch.equal(model.layers[0].weight_hh, priors[1].theta0)
    with pytest.raises(InputError, match="the prior belongs to other parameters"):
        InnerLoop(model, score, SGD(), priors, ReadConfig())


def test_empty_article_and_empty_training_text():
    lab = make_lab(torch.float32)
    empty = TokenizedArticle("e", "e", torch.empty(0, dtype=torch.int64), 0, 0)
    with pytest.raises(InputError, match="article 'e' is empty"):
        read(lab, Static(), empty)
    with pytest.raises(InputError, match="no text to measure"):
        measure_priors(lab[0], lab[1], iter([]))


def test_static_rms_is_the_root_mean_square_of_segment_gradients():
    model, score, _ = make_lab()
    pieces = list(article_segments(make_article(24).ids_T, START, 8))
    priors = measure_priors(model, score, iter(pieces))
    squares, hidden = 0, None
    for inputs, targets in pieces:
        losses, hidden = score(inputs, targets, hidden)
        hidden = tuple((h.detach(), c.detach()) for h, c in hidden)
        squares = squares + torch.autograd.grad(losses.mean(), model.layers[0].weight_hh)[0].square()
    (rms,) = [p.rms for p in priors if p.name == "layers.0.weight_hh"]
    torch.testing.assert_close(rms, (squares / 3).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_any_memory_layout_are_matrices(layout):
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 4, 3)
    images, targets = torch.randn(2, 3, 5, 5).to(memory_format=layout), torch.randn(2, 4, 3, 3)

    def score(inputs, targets, hidden):
        return (net(inputs) - targets).square().flatten(1).mean(1), None

    priors = measure_priors(net, score, iter([(images, targets)]))
    with InnerLoop(net, score, SGD(0.1), priors) as reader:
        before = [theta.clone() for theta in reader.thetas]
        weight, bias = reader.segment(images, targets).grads
        assert (weight.shape, bias.shape) == ((4, 27), (1, 4))
        for theta, start, grad in zip(reader.thetas, before, (weight, bias), strict=True):
            torch.testing.assert_close(theta, start - 0.1 * grad)
    (expected,) = torch.autograd.grad(score(images, targets, None)[0].mean(), net.weight)  # θ0 is back
    torch.testing.assert_close(weight, expected.flatten(1))


def far_lab():
    """A lab whose prior knows gradients a thousand times smaller than those of its text."""
    model, score, priors = make_lab(torch.float64)
    return model, score, [p._replace(rms=p.rms / 1000, mean_rms=p.mean_rms / 1000) for p in priors]


def test_the_trust_region_scales_each_gradient_to_its_bound_and_keeps_its_direction():
    lab = far_lab()
    piece = next(article_segments(make_article(8).ids_T, START, 8))
    with reader_for(lab, SGD(0.5), trust=0) as reader:
        free = reader.segment(*piece).grads
        assert reader.clipped == 0
    with reader_for(lab, SGD(0.5), trust=4) as reader:
        within = reader.segment(*piece).grads
        assert reader.clipped == 1
    for grad, clipped, prior in zip(free, within, lab[2], strict=True):
        assert float(clipped.norm()) == pytest.approx(4 * float(prior.rms.norm()), rel=1e-12)
        torch.testing.assert_close(clipped / clipped.norm(), grad / grad.norm(), rtol=1e-12, atol=0)


def test_gradients_inside_the_trust_region_are_left_bit_for_bit():
    lab, article = make_lab(torch.float32), make_article(80)
    with reader_for(lab, SGD(0.5), trust=1e6) as reader:
        bounded = reader.read(article, START)
        assert reader.clipped == 0
    with reader_for(lab, SGD(0.5), trust=0) as reader:
        assert torch.equal(bounded, reader.read(article, START))


def test_a_second_reader_on_a_model_is_refused_until_the_first_ends():
    lab = make_lab(torch.float32)
    outside = reader_for(lab, SGD(0.5))
    with reader_for(lab, SGD(0.5)) as reader:
        reader.segment(*next(article_segments(make_article(8).ids_T, START, 8)))
        learned = reader.thetas[0].clone()
        with pytest.raises(InputError, match="a reader with rule 'sgd' reads with this model"):
            reader_for(lab, RMS()).begin()
        with pytest.raises(InputError, match="read with a copy"), outside:
            pass
        assert torch.equal(reader.thetas[0], learned)
        copied = copy.deepcopy(lab[0])
        InnerLoop(copied, LSTMScorer(copied), SGD(0.5), lab[2], reader.config)
    with outside:
        pass


def test_making_a_loop_leaves_the_model_alone_and_reading_needs_a_beginning():
    lab = make_lab(torch.float32)
    with torch.no_grad():
        lab[0].embedding.weight.add_(1.0)
    moved = lab[0].embedding.weight.clone()
    reader = reader_for(lab, SGD(0.5))
    assert torch.equal(lab[0].embedding.weight, moved)
    piece = next(article_segments(make_article(8).ids_T, START, 8))
    with pytest.raises(InputError, match="has not begun"):
        reader.segment(*piece)
    reader.begin()
    assert torch.equal(lab[0].embedding.weight, lab[2][0].theta0)
    reader.segment(*piece)


@pytest.mark.parametrize("change", [lambda x: x[:, None], lambda x: x[:-1], lambda x: x.mean()])
def test_a_scorer_must_give_each_target_a_loss(change):
    model, score, priors = make_lab(torch.float32)

    def other(inputs_S, targets_S, hidden):
        losses_S, hidden = score(inputs_S, targets_S, hidden)
        return change(losses_S), hidden

    reader = reader_for((model, other, priors), SGD(0.1))
    with pytest.raises(InputError, match="must give each target its loss"), reader:
        reader.read(make_article(16), START)


def test_a_loss_that_is_not_finite_before_any_update_is_the_models():
    lab = make_lab(torch.float32)
    with torch.no_grad():
        next(lab[0].parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match="before any update: the model's weights or the text"):
        InnerLoop(lab[0], lab[1], SGD(0.1), [p._replace(theta0=p.theta0 * float("nan")) for p in lab[2]]).read(
            make_article(16), START
        )


def test_reading_keeps_no_tensor_of_a_segment():
    """A small one kept of each breaks up the memory that its logits leave: a long stream took 1 MB a segment."""
    (model, scorer, priors), kept = make_lab(), []

    def score(inputs_S, targets_S, hidden):
        losses_S, hidden = scorer(inputs_S, targets_S, hidden)
        assert sum(not losses.expired() for losses in kept) <= 1  # the last one may be in use
        kept.append(StorageWeakRef(losses_S.untyped_storage()))
        return losses_S, hidden

    article = make_article(80)
    with InnerLoop(model, score, Static(), priors, ReadConfig(segment=8)) as reader:
        assert reader.read(article, START).shape == (80,)
    assert len(kept) == 10
