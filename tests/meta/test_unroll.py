"""The unroll engine: slices change nothing, the second order is exact, and it leaves the world as it found it."""

from dataclasses import replace

import pytest
import torch

from dynlm.data.segments import article_segments
from dynlm.inner import Snapshot
from dynlm.meta.unroll import Unroll, UnrollConfig
from dynlm.models.core import LSTMScorer
from dynlm.models.lstm import ModelConfig
from dynlm.models.params import adapted_parameters
from dynlm.optim.handmade import RMS, SGD, Adam
from dynlm.types import InputError
from lab import START, TransformerScorer, make_article, make_lab, make_transformer_lab
from support.oracles import Work, functional_loss
from support.rules import make

SEGMENT, N_SEGMENTS = 4, 7
PIECES = list(article_segments(make_article(SEGMENT * N_SEGMENTS, seed=3).ids_T, START, SEGMENT))
WEIGHTS = [0.1 + 0.05 * t for t in range(N_SEGMENTS)]
SLICES = {1: [(2,), (4, 2)], 2: [(1,), (3,), (7,), (20,), (5, 3, 1)]}
"""by order, of 7 segments: dividing and not, longer than the window, and nested"""


def origin(lab, rule):
    """θ0 as leaves, an empty memory, and no hidden state."""
    thetas = [prior.theta0.clone().requires_grad_() for prior in lab[2]]
    return Snapshot(thetas, rule.init(lab[2]), None)


def make_unroll(lab, rule, **config):
    return Unroll(lab[1], rule, adapted_parameters(lab[0]), lab[2], UnrollConfig(**config))


def meta_gradients(loss, rule, start):
    """Of φ and of the start, in one list; what is not reached is zero."""
    wanted = [*rule.parameters(), *start.thetas]
    return torch.autograd.grad(loss, wanted, materialize_grads=True)


def equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.fixture(scope="module")
def dropping_lab():
    """An LSTM in train mode with every kind of dropout."""
    dropouts = dict.fromkeys(["embedding_dropout", "input_dropout", "output_dropout", "weight_drop"], 0.3)
    config = ModelConfig(embedding_size=6, hidden_size=7, layers=2, hidden_dropout=0.3, **dropouts)
    _, _, priors = make_lab(layers=2)
    model = config.build(priors[0].theta0.shape[0], START, seed=1).double().train()
    assert [a.name for a in adapted_parameters(model)] == [p.name for p in priors]
    return model, LSTMScorer(model), priors


def run_dropping(lab, rule, **config):
    torch.manual_seed(11)
    start = origin(lab, rule)
    unrolled = make_unroll(lab, rule, **config).run(start, PIECES, WEIGHTS)
    after = torch.rand(1)
    return unrolled.loss.detach(), meta_gradients(unrolled.loss, rule, start), unrolled.position, after


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["adam", "lstm"])
def test_slices_change_nothing_with_dropout_and_carried_state(dropping_lab, name, order):
    rule = make(name, dropping_lab[2])
    loss, grads, position, after = run_dropping(dropping_lab, rule, order=order)
    assert position.hidden is not None
    assert all(g.abs().max() > 0 for g in grads)
    torch.manual_seed(12)
    other_seed = make_unroll(dropping_lab, rule).run(origin(dropping_lab, rule), PIECES, WEIGHTS)
    assert other_seed.loss.item() != loss.item(), "dropout is on"
    for slices in SLICES[order]:
        sliced_loss, sliced_grads, end, sliced_after = run_dropping(dropping_lab, rule, order=order, slices=slices)
        torch.testing.assert_close(sliced_loss, loss, rtol=1e-14, atol=0)  # a slice's losses are summed first
        assert torch.equal(sliced_after, after), "the random numbers that follow are the same"
        assert equal(end.thetas, position.thetas)
        assert equal([x for pair in end.hidden for x in pair], [x for pair in position.hidden for x in pair])
        for actual, expected in zip(sliced_grads, grads, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_dropout_of_the_second_order_is_replayed(dropping_lab):
    """The second order runs each segment twice: with other masks it would be the gradient of another loss."""
    model, _, priors = dropping_lab
    rule = SGD(0.3, 0.01)
    _, grads, *_ = run_dropping(dropping_lab, rule, order=2)
    torch.manual_seed(11)
    start = origin(dropping_lab, rule)
    work = Work(model, LSTMScorer, rule, adapted_parameters(model), priors, start, PIECES, WEIGHTS, order=2)
    for actual, expected in zip(grads, meta_gradients(functional_loss(work), rule, start), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("slices", "again"), [((), 0), ((3,), 7), ((4, 2), 7 + 2 + 2)])
def test_each_level_of_slices_reads_again(lab, slices, again, order):
    """An outer slice reads as far as its last inner one, to have where the inner ones start; they read to their end."""
    model, score, priors = lab
    calls = []

    def counting(*segment):
        calls.append(1)
        return score(*segment)

    rule = make("gated", priors)
    unrolled = make_unroll((model, counting, priors), rule, order=order, slices=slices)
    unrolled.run(origin(lab, rule), PIECES, WEIGHTS).loss.backward()
    assert len(calls) == N_SEGMENTS * order + again


def test_a_window_goes_on_where_another_ended(dropping_lab):
    rule = make("gated", dropping_lab[2])
    unroll = make_unroll(dropping_lab, rule, slices=(2,))
    torch.manual_seed(11)
    first = unroll.run(origin(dropping_lab, rule), PIECES[:3], WEIGHTS[:3])
    second = unroll.run(first.position, PIECES[3:], WEIGHTS[3:])
    torch.manual_seed(11)
    whole = unroll.run(origin(dropping_lab, rule), PIECES, WEIGHTS)
    assert (first.loss + second.loss).item() == pytest.approx(whole.loss.item(), rel=1e-14)
    assert equal(second.position.thetas, whole.position.thetas)
    assert second.position.state.clock == whole.position.state.clock


def test_the_start_and_the_model_are_left_as_they_were(dropping_lab):
    rule = make("gated", dropping_lab[2])
    start, model = origin(dropping_lab, rule), dropping_lab[0]
    thetas, clock = [t.clone() for t in start.thetas], replace(start.state.clock)
    parameters = {name: (p, p.clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    make_unroll(dropping_lab, rule, order=2, slices=(3,)).run(start, PIECES, WEIGHTS).loss.backward()
    assert equal(start.thetas, thetas)
    assert start.state.clock == clock
    assert all((slot == 0).all() for slots in start.state.slots for slot in slots)
    for name, p in model.named_parameters(remove_duplicate=False):
        assert p is parameters[name][0]
        assert torch.equal(p, parameters[name][1])
        assert p.grad is None


class Alone:
    """A scorer without carried state: what is detached between segments has no derivative to compare with."""

    def __init__(self, score):
        self.score = score

    def __call__(self, inputs_S, targets_S, hidden):
        return self.score(inputs_S, targets_S, None)[0], None


def make_plain_lab(kind):
    model, score, priors = make_lab() if kind == "lstm" else make_transformer_lab()
    return model, Alone(score), priors


FINITE = {"sgd": SGD(0.3, 0.02), "rms": RMS(1e-2, 1e-2, 1e-2), "adam": Adam(0.02, 1e-2, 0.01)}
"""Rules that see nothing but θ and g: what they observe otherwise is a constant to the engine, not to differences."""


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
@pytest.mark.parametrize("name", FINITE)
def test_the_second_order_matches_finite_differences(kind, name):
    lab, rule = make_plain_lab(kind), FINITE[name]
    start = origin(lab, rule)
    # MAML's start is also what the rule decays to: the priors' θ0 is the same leaf
    priors = [p._replace(theta0=t) for p, t in zip(lab[2], start.thetas, strict=True)]
    unroll = make_unroll((*lab[:2], priors), rule, order=2, slices=(3,))
    pieces, weights = PIECES[:5], WEIGHTS[:5]
    wanted = [*rule.parameters(), *start.thetas]
    grads = torch.autograd.grad(unroll.run(start, pieces, weights).loss, wanted)
    generator = torch.Generator().manual_seed(4)

    def moved_loss(moves):
        with torch.no_grad():
            for tensor, move in zip(wanted, moves, strict=True):
                tensor += move
            loss = unroll.run(start, pieces, weights).loss.item()
            for tensor, move in zip(wanted, moves, strict=True):
                tensor -= move
        return loss

    n_phi = len(list(rule.parameters()))
    settings = [[j == i for j in range(len(wanted))] for i in range(n_phi)]
    for group in [*settings, [i >= n_phi for i in range(len(wanted))]]:  # each setting of φ alone, then all of θ0
        direction = [
            inside * torch.randn(t.shape, generator=generator, dtype=t.dtype)
            for inside, t in zip(group, wanted, strict=True)
        ]
        h = 1e-5 * min([1.0, *(t.item() for t, inside in zip(wanted, group, strict=True) if inside and t.dim() == 0)])
        up, down = (moved_loss([sign * h * d for d in direction]) for sign in (1, -1))
        slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True)).item()
        assert slope == pytest.approx((up - down) / (2 * h), rel=2e-5, abs=1e-9), group


def flags():
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cudnn.enabled


class Watching(TransformerScorer):
    """Notes the flags while it scores; breaks at call number ``breaks_at``."""

    def __init__(self, model, breaks_at=0):
        super().__init__(model)
        self.seen, self.breaks_at = [], breaks_at

    def __call__(self, *segment):
        self.seen.append(flags())
        if len(self.seen) == self.breaks_at:
            raise ArithmeticError("broken here")
        return super().__call__(*segment)


@pytest.fixture(params=[(True, True, True, True), (True, False, True, False)], ids=["all on", "some off"])
def set_flags(request):
    """Flags as a user set them, and as they were before."""
    before, cuda, cudnn = flags(), torch.backends.cuda, torch.backends.cudnn
    setters = [cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp, cuda.enable_math_sdp]

    def put(values):
        for setter, value in zip(setters, values, strict=False):
            setter(value)
        cudnn.enabled = values[3]

    put(request.param)
    yield request.param
    put(before)


def test_only_the_second_order_switches_attention_and_puts_it_back(set_flags):
    model, _, priors = make_transformer_lab()
    assert model.config._attn_implementation == "sdpa"
    rule = RMS(1e-3, 1e-3, 0.01)
    for order, expected in ((1, set_flags), (2, (False, False, True, False))):
        score = Watching(model)
        start = origin((model, score, priors), rule)
        loss = make_unroll((model, score, priors), rule, order=order, slices=(2,)).run(start, PIECES, WEIGHTS).loss
        assert flags() == set_flags
        loss.backward()
        assert flags() == set_flags
        assert len(score.seen) > N_SEGMENTS
        assert set(score.seen) == {expected}
        assert all(torch.isfinite(p.grad) for p in rule.parameters())


@pytest.mark.parametrize("breaks_at", [3, N_SEGMENTS + 2], ids=["reading", "backwards"])
def test_flags_and_parameters_are_put_back_after_an_exception(set_flags, breaks_at):
    model, _, priors = make_transformer_lab()
    score, rule = Watching(model, breaks_at), SGD(0.1)
    lab = model, score, priors
    before = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(ArithmeticError, match="broken here"):
        make_unroll(lab, rule, order=2).run(origin(lab, rule), PIECES, WEIGHTS).loss.backward()
    assert len(score.seen) == breaks_at
    assert flags() == set_flags
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is p for name, p in before.items())


@pytest.mark.parametrize("order", [1, 2])
def test_weights_without_gradient_do_not_spoil_adams_meta_gradient(order):
    lab, rule = make_transformer_lab(), Adam(0.02, 1e-3, 0.01)
    assert (lab[2][1].rms[SEGMENT * 2 :] == 0).all(), "no segment reaches these positions"
    start = origin(lab, rule)
    loss = make_unroll(lab, rule, order=order).run(start, PIECES, WEIGHTS).loss
    assert all(torch.isfinite(g).all() for g in meta_gradients(loss, rule, start))


def test_errors(lab):
    rule = SGD(0.1)
    with pytest.raises(InputError, match=r"^no segment to unroll$"):
        make_unroll(lab, rule).run(origin(lab, rule), [], [])
    for slices in [(2, 4), (8, 4, 5)]:
        with pytest.raises(InputError, match=r"slices \(.*\) must fall from the outermost level"):
            make_unroll(lab, rule, slices=slices)
    with pytest.raises(InputError, match=r"7 segments, but 6 weights"):
        make_unroll(lab, rule).run(origin(lab, rule), PIECES, WEIGHTS[:6])
