"""Honest readers pass every audit; each planted leak fails the one that is there for it."""

import dataclasses

import pytest
import torch

from dynlm.evaluation.audit import audit
from dynlm.evaluation.audit import verdicts as each_verdict
from dynlm.evaluation.audit_articles import adds_up, excerpt
from dynlm.evaluation.cache import CacheConfig, CachedReader
from dynlm.inner import InnerLoop, ReadConfig, Update
from dynlm.models.params import adapted_parameters
from dynlm.optim.gated import Gated
from dynlm.optim.handmade import RMS, SGD, Adam, Static
from dynlm.priors import make_priors
from dynlm.types import Article, TokenizedArticle
from lab import START, VOCAB, make_article, make_lab, make_transformer_lab

A, B = (excerpt(make_article(300, seed, id), 8) for seed, id in ((1, "A"), (2, "B")))
SETTINGS = {"lr": 3e-2, "eps": 1e-3, "decay": 1e-2}
SGD_RULE = SGD(0.5, 1e-2)


def reader_of(lab, rule=SGD_RULE, kind=InnerLoop, score=None, **config):
    return kind(lab[0], score or lab[1], rule, lab[2], ReadConfig(**{"segment": 8, **config}))


def verdicts(make_reader):
    return {v.name: v for v in audit(make_reader, A, B, START, VOCAB)}


def failed(make_reader):
    return {name for name, verdict in verdicts(make_reader).items() if not verdict.passed}


def fails(make_reader, *names):
    """Whether all of these checks fail; those after the last of them are spared."""
    left = set(names)
    for found in each_verdict(make_reader, A, B, START, VOCAB):
        left -= set() if found.passed else {found.name}
        if not left:
            return True
    return False


@pytest.mark.parametrize(
    ("name", "reset"),
    [("static", "article"), ("rms", "article"), ("adam", "article"), ("gated", "article"), ("sgd", "never")],
)
def test_honest_rules_pass(name, reset):
    lab = make_lab(torch.float32)
    rules = {"static": Static(), "sgd": SGD(0.5), "rms": RMS(**SETTINGS), "adam": Adam(1e-2)}
    rules["gated"] = Gated.started_at(SETTINGS, lab[2])
    found = verdicts(lambda: reader_of(lab, rules[name], reset=reset))
    assert [v for v in found.values() if not v.passed] == []
    assert ("not asked" in found["zero rate equals static"].detail) == (name == "static")
    assert len(found) == 10


@pytest.mark.parametrize("make", [make_lab, make_transformer_lab])
def test_a_cache_beside_a_rule_passes(make):
    lab = make(torch.float32)
    cache = CacheConfig(weight=0.3, theta=1.0, window=13)
    assert failed(lambda: CachedReader.beside(reader_of(lab), cache)) == set()


class UpdatesFirst(InnerLoop):
    """Learns a segment, then scores it."""

    def segment(self, inputs_S, targets_S, last=False):
        before = self.hidden
        super().segment(inputs_S, targets_S)
        after, self.hidden = self.hidden, before
        with torch.no_grad():
            losses_S, _ = self.score(inputs_S, targets_S, before)
        self.hidden = after
        return Update(losses_S, [], None)


def test_an_update_before_the_score_fails():
    lab = make_lab(torch.float32)
    assert fails(lambda: reader_of(lab, kind=UpdatesFirst), "causality", "causality in each segment")


def test_a_peek_one_token_ahead_fails():
    lab = make_lab(torch.float32)

    def peeking(inputs_S, targets_S, hidden):
        losses_S, hidden = lab[1](inputs_S, targets_S, hidden)
        return losses_S + 1e-3 * targets_S.roll(-1), hidden

    assert fails(lambda: reader_of(lab, score=peeking), "causality", "probabilities sum to one")


def test_state_from_a_later_article_fails():
    lab = make_lab(torch.float32)
    kept = []

    class Hoards(InnerLoop):
        """Starts from the weights that the article read last has left, whichever that was."""

        def begin(self):
            super().begin()
            with torch.no_grad():
                for theta, left in zip(self.thetas, kept, strict=bool(kept)):
                    theta.copy_(left)

        def read(self, article, start_id, progress=None):
            losses_T = super().read(article, start_id, progress)
            kept[:] = [theta.clone() for theta in self.thetas]
            return losses_T

    assert fails(lambda: reader_of(lab, kind=Hoards), "nothing of other articles")


def test_what_is_left_behind_fails():
    lab = make_lab(torch.float32)

    class Leaves(InnerLoop):
        def __exit__(self, kind, error, trace):
            self.leaves = kind is not None
            super().__exit__(kind, error, trace)

        def restore(self):
            if not getattr(self, "leaves", False):
                super().restore()

    assert fails(lambda: reader_of(lab, kind=Leaves), "weights restored")


def test_a_distribution_that_does_not_sum_to_one_fails():
    lab = make_lab(torch.float32)
    honest = lab[1]

    def cheap(inputs_S, targets_S, hidden):
        losses_S, hidden = honest(inputs_S, targets_S, hidden)
        return 0.9 * losses_S, hidden

    assert failed(lambda: reader_of(lab, score=cheap)) == {"probabilities sum to one"}
    uniform = torch.nn.Embedding(1, 1)  # a model without logits is asked for every token
    sizes = {"honest": VOCAB, "cheap": VOCAB - 1}

    for name, size in sizes.items():

        def score(inputs_S, targets_S, hidden, size=size):
            return uniform.weight.sum() * 0 + torch.full(targets_S.shape, float(size)).log(), None

        priors = make_priors(adapted_parameters(uniform), [torch.ones(1, 1)])
        found = failed(lambda score=score, priors=priors: reader_of((uniform, score, priors)))
        assert found == (set() if name == "honest" else {"probabilities sum to one"})


def test_a_token_left_out_or_scored_twice_fails():
    lab = make_lab(torch.float32)

    class Skips(InnerLoop):
        def read(self, article, start_id, progress=None):
            short = dataclasses.replace(article, ids_T=article.ids_T[:-1])
            return torch.cat([super().read(short, start_id, progress), torch.zeros(1)])

    assert fails(lambda: reader_of(lab, kind=Skips), "every token scored once")


def test_a_rate_of_zero_that_still_moves_fails():
    lab = make_lab(torch.float32)

    class Drifts(SGD):
        traceable = False

        def step(self, w, slots, context):
            theta, slots = super().step(w, slots, context)
            return theta * 1.001, slots

    rule = Drifts(0.1)
    assert failed(lambda: reader_of(lab, rule)) == {"zero rate equals static"}
    assert rule.lr.item() == 0.1


def test_counts_are_held_against_the_raw_text():
    text = Article("a", "Title", "Two words .\n a b \n")
    tokens = TokenizedArticle("a", "Title", torch.arange(7), text.n_words, text.n_bytes)
    assert adds_up(text, tokens, lambda ids: text.text).passed
    assert "9 words" not in adds_up(text, tokens).detail
    for wrong in ({"n_words": 8}, {"n_bytes": 17}):
        assert not adds_up(text, dataclasses.replace(tokens, **wrong)).passed
    assert "spell 4 of 5 words" in adds_up(text, tokens, lambda ids: "Two words .\n a").detail
