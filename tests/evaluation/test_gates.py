"""COPY, UPDATE and FLUSH against closed forms and finite differences; looking on changes nothing."""

import copy
import json

import pytest
import torch

from dynlm.data.tokenizers import WordTokenizer
from dynlm.evaluation.breakdowns import ArticlesRead, break_down
from dynlm.evaluation.cache import CacheConfig, CachedReader
from dynlm.evaluation.compare import write_results
from dynlm.evaluation.gates import SAMPLE, GateRecorder, draw_sample
from dynlm.evaluation.stream import read_and_watch
from dynlm.files import read_json, read_tensors
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.optim.base import Coordinates
from dynlm.optim.gated import Gated
from dynlm.optim.handmade import RMS, SGD, Static
from dynlm.optim.library import start_rule
from dynlm.optim.linear import Linear, LinearConfig
from dynlm.runs import Run
from dynlm.types import InputError
from lab import START, VOCAB, make_article, make_lab
from support.rules import LEARNING, SETTINGS, make


def reader_of(lab, rule, kind=InnerLoop, **config):
    return kind(lab[0], lab[1], rule, lab[2], ReadConfig(**{"segment": 8, **config}))


def recorded(reader, article):
    recorder = GateRecorder(reader)
    with reader, recorder.article():
        reader.read(article, START)
    return recorder.gates()


def means(priors, form):
    return torch.tensor([float(form(prior).mean()) for prior in priors])


@pytest.mark.parametrize("kernel", ["auto", "eager"])
def test_closed_forms(kernel):
    lab = make_lab()
    priors = lab[2]
    assert all(prior.theta0.numel() <= SAMPLE for prior in priors)  # whole tensors: no sampling error
    forms = {
        SGD(0.3, 0.02): (lambda p: 0.3 * p.rms, lambda p: torch.full_like(p.rms, 0.02)),
        Linear(LinearConfig(-0.2, 0.05)): (lambda p: 0.2 * p.rms, torch.zeros_like),
        RMS(**SETTINGS): (
            lambda p: 3e-2 * p.rms / (p.rms + 1e-3),
            lambda p: (1e-2 * p.relative_rms * p.rms).clamp(max=1.0),
        ),
    }
    for rule, (update, flush) in forms.items():
        gates = recorded(reader_of(lab, rule, kernel=kernel), make_article(50))
        assert gates.values_3Un.shape == (3, 6, len(priors))
        assert gates.values_3Un.dtype == torch.float32
        flush_n = means(priors, flush) if rule.name != "linear" else torch.zeros(len(priors))
        for t in range(6):
            copy_n, update_n, now_n = gates.values_3Un[:, t]
            torch.testing.assert_close(update_n, means(priors, update))
            torch.testing.assert_close(now_n, flush_n)
            torch.testing.assert_close(copy_n, 1 - flush_n)


def test_gated_starts_with_the_gates_of_its_rms_rule():
    lab, article = make_lab(), make_article(50)
    rms, gated = (
        recorded(reader_of(lab, rule), article).values_3Un
        for rule in (RMS(**SETTINGS), Gated.started_at(SETTINGS, lab[2]).double())
    )
    torch.testing.assert_close(gated, rms)


def same_gates(rule, step):
    """``step`` with what a cell's network puts out as it is at the first call, which is made here."""
    outputs = []
    rule.gate = lambda output: outputs.append(output) or output
    step()

    def again(*arguments):
        kept = iter(outputs)
        rule.gate = lambda output: next(kept)
        result = step(*arguments)
        del rule.gate
        return result

    return again


def differences(rule, thetas, grads, state, priors):
    """(3, n) by central differences over whole matrices, through the plain step."""
    seen, _ = rule.observe(thetas, grads, state, priors)
    context_nN, _ = rule.tensor_step(rule.shared(priors, seen.scalars, [state.clock.step]), state.tensors)
    values = []
    for i, prior in enumerate(priors):
        w = Coordinates(thetas[i], prior.theta0, prior.rms, grads[i], seen.rows[i], seen.cols[i])
        step = same_gates(rule, lambda w=w, i=i: rule.flat_step(w, state.slots[i], context_nN[i])[0])
        slopes = []
        for field, size in (("theta", 1e-7), ("grad", 1e-6 * prior.mean_rms), ("theta0", 1e-7)):
            ends = (w._replace(**{field: getattr(w, field) + sign * size}) for sign in (1, -1))
            high, low = map(step, ends)
            slopes.append((high - low) / (2 * size))
        copy, slope, flush = slopes
        values.append(torch.stack([copy.mean(), (-slope * prior.rms).mean(), flush.mean()]))
    return torch.stack(values, 1)


@pytest.mark.parametrize("kind", LEARNING)
def test_every_rule_agrees_with_finite_differences(kind):
    lab = make_lab()
    rule = make(kind, lab[2])
    by_hand = []

    class Spied(InnerLoop):
        def learn(self, scored):
            before = [theta.clone() for theta in self.thetas], copy.deepcopy(self.state)
            step = super().learn(scored)
            if step.seen is not None:
                before[1].clock = self.state.clock
                with torch.no_grad():
                    by_hand.append(differences(rule, before[0], step.grads, before[1], self.priors))
            return step

    gates = recorded(reader_of(lab, rule, Spied, kernel="eager"), make_article(40))
    assert gates.values_3Un.isfinite().all()
    torch.testing.assert_close(gates.values_3Un, torch.stack(by_hand, 1).float(), rtol=1e-3, atol=1e-6)
    # a rule sees θ only against θ0: moving both moves the new weight as far
    torch.testing.assert_close(gates.values_3Un[0] + gates.values_3Un[2], torch.ones(4, len(lab[2])))


def test_the_gates_of_a_gated_cell_are_its_own():
    """FLUSH is the pull that the cell works out, in [0, 1], and COPY what it leaves."""
    lab = make_lab()
    rule = make("gated", lab[2])
    gates = recorded(reader_of(lab, rule, kernel="eager"), make_article(40)).values_3Un
    assert gates[2].min() >= 0
    assert gates[2].max() <= 1
    assert gates[2].std() > 0
    torch.testing.assert_close(gates[0], 1 - gates[2])
    assert not rule.holds_gates


def test_samples_cover_a_matrix_and_are_the_same_each_time():
    first, again = (draw_sample((100, 60), 512, torch.Generator().manual_seed(0)) for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert first.row_K.numel() == 512
    assert set(first.row_K.tolist()) == set(range(100))
    matrix = torch.arange(6000.0).view(100, 60)
    assert torch.equal(first.take(matrix), (60 * first.row_K + first.col_K).double())
    assert torch.equal(first.take(matrix[:, :1]), 60.0 * first.row_K.double())
    assert torch.equal(first.take(matrix[:1]), first.col_K.double())
    assert first.take(matrix[..., None].expand(100, 60, 3)).shape == (512, 3)
    everything = draw_sample((5, 4), 512, torch.Generator().manual_seed(0))
    assert torch.equal(everything.take(matrix[:5, :4]).view(5, 4), matrix[:5, :4].double())


@pytest.mark.parametrize("kind", ["sgd", "gated", "mlp", "gru"])
@pytest.mark.parametrize("reset", ["article", "never"])
def test_looking_on_changes_no_bit_and_no_random_number(kind, reset):
    lab, articles = make_lab(torch.float32), [make_article(n, n) for n in (50, 7, 40)]
    rule = SGD(0.5, 0.01) if kind == "sgd" else start_rule(kind, SETTINGS, lab[2])
    plain = read_and_watch(reader_of(lab, rule, reset=reset), articles, START)
    random = torch.random.get_rng_state()
    reader = reader_of(lab, rule, reset=reset)
    watched = read_and_watch(reader, articles, START, gate_articles=2)
    assert reader.observers == []
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(plain.losses, watched.losses, strict=True))
    assert plain.gates is None
    # 50 tokens are 7 segments and 7 tokens one; the last one updates only what goes on
    assert watched.gates.segments == ([7, 1] if reset == "never" else [6, 0])
    assert watched.gates.values_3Un.shape == (3, sum(watched.gates.segments), len(lab[2]))
    assert watched.gates.tensors == [prior.name for prior in lab[2]]
    assert watched.gates.weights == [prior.theta0.numel() for prior in lab[2]]
    if reset == "never":
        assert torch.equal(plain.again, watched.again)


def test_nothing_is_recorded_where_nothing_is_updated():
    lab, article = make_lab(torch.float32), make_article(50)
    for rule, articles in ((Static(), [article]), (SGD(0.5), [make_article(7)])):
        assert read_and_watch(reader_of(lab, rule), articles, START, gate_articles=8).gates is None


def test_a_cache_beside_a_rule_changes_none_of_its_gates():
    lab, article = make_lab(torch.float32), make_article(50)
    reader = reader_of(lab, SGD(0.5, 0.01))
    cached = CachedReader.beside(reader, CacheConfig(0.3, 1.0, 13))
    found = read_and_watch(cached, [article], START, gate_articles=1).gates
    assert torch.equal(found.values_3Un, recorded(reader, article).values_3Un)


def test_the_readers_step_is_put_back_after_an_error():
    lab = make_lab(torch.float32)
    reader = reader_of(lab, SGD(1e30, 1e20))
    with pytest.raises(InputError, match=r"the loss is (inf|nan) at segment"):
        read_and_watch(reader, [make_article(50)], START, gate_articles=1)
    assert reader.observers == []


def test_gates_come_back_from_the_files(tmp_path):
    lab, articles = make_lab(torch.float32), [make_article(n, n) for n in (50, 40, 30)]
    scores = {
        name: read_and_watch(reader_of(lab, rule), articles, START, gate_articles=2)
        for name, rule in {"static": Static(), "sgd": SGD(0.5, 0.01)}.items()
    }
    tokenizer = WordTokenizer(["<eos>", *map(str, range(1, VOCAB))])
    found = break_down(scores, ArticlesRead(articles, tokenizer, {str(i): i for i in range(VOCAB)}, 8, "article"))
    write_results(Run(tmp_path), scores, articles, {"breakdowns": found})
    gates, (tensors, _) = read_json(Run(tmp_path).results)["breakdowns"]["gates"], read_tensors(Run(tmp_path).losses)
    assert set(gates) == {"sgd"}
    assert gates["sgd"]["segments"] == [6, 4]
    assert gates["sgd"]["tensors"] == [prior.name for prior in lab[2]]
    values = tensors["gates/sgd"]
    assert torch.equal(values, scores["sgd"].gates.values_3Un)
    for gate, of_gate in zip(("copy", "update", "flush"), values, strict=True):
        assert gates["sgd"]["mean"][gate] == pytest.approx(of_gate.double().mean(0).tolist())
    assert json.dumps(gates, allow_nan=False)
