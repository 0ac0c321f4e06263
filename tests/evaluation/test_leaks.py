"""Planted leaks of many kinds, each of which the audit finds; what it must not call a leak is in test_audit."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dynlm.data.segments import article_segments
from dynlm.evaluation.audit import verdicts
from dynlm.evaluation.cache import CacheConfig, CachedReader
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.optim.handmade import SGD, Adam
from lab import START, VOCAB, make_article, make_lab, make_transformer_lab

A, B = make_article(300, 1, "A"), make_article(300, 2, "B")
SIZE = 8
CAUSALITY = ("causality", "causality in each segment")
RARE = int(A.ids_T.bincount().float().masked_fill(A.ids_T.bincount() == 0, 1e9).argmin())


def failing(make_reader, quick=False):
    return {v.name for v in verdicts(make_reader, A, B, START, VOCAB, quick=quick) if not v.passed}


def found_by(make_reader, *names):
    """Whether one of these checks fails; the checks after it are spared."""
    return any(v.name in names and not v.passed for v in verdicts(make_reader, A, B, START, VOCAB))


def reader_of(lab, kind=InnerLoop, score=None, rule=None, **config):
    return kind(lab[0], score or lab[1], rule or SGD(0.5, 1e-2), lab[2], ReadConfig(**{"segment": SIZE, **config}))


class Changes:
    """A scorer whose scores go through ``change(losses_S, targets_S)`` in every so many segments from ``first`` on."""

    def __init__(self, score, change, first=0, every=1):
        self.score, self.change, self.first, self.every = score, change, first, every

    def __call__(self, inputs_S, targets_S, hidden):
        number, inner = hidden if hidden is not None else (0, None)
        losses_S, inner = self.score(inputs_S, targets_S, inner)
        if number >= self.first and (number - self.first) % self.every == 0:
            losses_S = self.change(losses_S, targets_S)
        return losses_S, (number + 1, inner)


def peek(size):
    return lambda losses_S, targets_S: losses_S + size * (targets_S.roll(-1) % 2)


def peek_at_rare(losses_S, targets_S):
    return losses_S + 1e-3 * (targets_S.roll(-1) == RARE)


PEEKS = {
    "next token": (peek(1e-3), 0, 1),
    "next token, by a millionth": (peek(1e-6), 0, 1),
    "last token": (lambda losses_S, targets_S: losses_S + 1e-3 * targets_S[-1], 0, 1),
    "last token, every eighth segment": (lambda losses_S, targets_S: losses_S + 1e-3 * targets_S[-1], 7, 8),
    "from the eighth segment on": (peek(1e-3), 8, 1),
    "from the fortieth segment on": (peek(1e-3), 40, 1),
    "every eighth segment": (peek(1e-3), 3, 8),
    "every sixteenth segment from the twentieth on": (peek(1e-4), 20, 16),
    "one rare token": (peek_at_rare, 0, 1),
}


@pytest.mark.parametrize("name", PEEKS)
def test_audit_finds_a_peek_at_later_tokens(name):
    """The model shows no logits that could betray the score: it is the altered text that does."""
    lab = make_lab(torch.float32)
    change, first, every = PEEKS[name]
    assert found_by(lambda: reader_of(lab, score=Changes(lab[1], change, first, every)), *CAUSALITY)


@pytest.mark.parametrize(("first", "every"), [(1, 1), (0, 8), (8, 1)])
def test_audit_finds_scores_that_are_too_low(first, every):
    lab = make_lab(torch.float32)
    score = Changes(lab[1], lambda losses_S, targets_S: 0.9 * losses_S, first, every)
    assert found_by(lambda: reader_of(lab, score=score), "probabilities sum to one")


@pytest.fixture
def untapped(monkeypatch):
    """A lab whose logits nobody sees."""
    monkeypatch.setattr("dynlm.models.tap.Tap.__enter__", lambda self: self)
    monkeypatch.setattr("dynlm.models.tap.Tap.__exit__", lambda self, *error: None)
    return make_lab(torch.float32)


def test_audit_asks_a_model_without_logits(untapped):
    assert failing(lambda: reader_of(untapped)) == set()


@pytest.mark.parametrize("first", [0, 1, 8])
def test_audit_asks_a_model_without_logits_all_over_the_text(untapped, first):
    score = Changes(untapped[1], lambda losses_S, targets_S: 0.9 * losses_S, first)
    assert failing(lambda: reader_of(untapped, score=score)) == {"probabilities sum to one"}


def test_audit_finds_logits_that_know_their_target():
    """The distribution that is shown sums to one, and the score is its own: but it was made for this target."""
    model, _, priors = make_transformer_lab(torch.float32)
    target_S = []

    def favour(module, inputs, output):
        output.logits = output.logits + 0.1 * F.one_hot(target_S[-1], VOCAB)[None]
        return output

    model.register_forward_hook(favour)

    def score(inputs_S, targets_S, hidden):
        target_S[:] = [targets_S]
        return F.cross_entropy(model(inputs_S[None]).logits[0], targets_S, reduction="none"), None

    assert found_by(lambda: reader_of((model, score, priors)), *CAUSALITY)


class HoldsItself(CachedReader):
    """A cache that holds the target itself, once it holds ``after`` tokens."""

    after = 0

    def tapped(self, scored, tap):
        held = -1 if self.memory is None else len(self.memory.ids_N)
        honest = super().tapped(scored, tap)
        if held < self.after:
            return honest
        bonus_SV = 0.1 * F.one_hot(scored.targets_S, VOCAB)
        log_probs_SV = (tap.logits(scored.targets_S.numel()) + bonus_SV).log_softmax(1)
        losses_S = -log_probs_SV.gather(1, scored.targets_S[:, None])[:, 0]
        return honest._replace(losses_S=losses_S, log_probs=lambda: log_probs_SV)


@pytest.mark.parametrize(("after", "window"), [(0, 13), (250, 300), (400, 400)])
def test_audit_finds_a_cache_that_holds_the_target(after, window):
    lab = make_lab(torch.float32)

    def make_reader():
        reader = HoldsItself.beside(reader_of(lab), CacheConfig(0.3, 1.0, window))
        reader.after = after
        return reader

    assert found_by(make_reader, *CAUSALITY)


@pytest.mark.parametrize(
    "change",
    [
        lambda losses_T, article: losses_T - 0.1,
        lambda losses_T, article: losses_T.floor(),
        lambda losses_T, article: torch.where(losses_T > 3, losses_T - 1e-6, losses_T),
    ],
)
def test_audit_finds_scores_that_are_returned_otherwise(change):
    class Reports(InnerLoop):
        def read(self, article, start_id, progress=None):
            return change(super().read(article, start_id, progress), article)

    lab = make_lab(torch.float32)
    assert found_by(lambda: reader_of(lab, kind=Reports), "every token scored once")


def knows(of_article):
    """A reader whose scores depend on something of the article that is no token before."""

    class Knows(InnerLoop):
        def read(self, article, start_id, progress=None):
            self.known = of_article(article)
            return super().read(article, start_id, progress)

        def segment(self, inputs_S, targets_S, last=False):
            step = super().segment(inputs_S, targets_S, last)
            scale = 1 + 1e-3 * (self.known % 7) if hasattr(self, "known") else 1
            return step._replace(losses_S=step.losses_S * scale)

    return Knows


@pytest.mark.parametrize(
    "of_article",
    [
        lambda article: len(article),
        lambda article: article.n_words,
        lambda article: article.n_bytes,
        lambda article: len(article.title),
        lambda article: sum(map(ord, article.title)) % 5,
        lambda article: len(article) // SIZE,
    ],
)
def test_audit_finds_what_is_known_of_the_article(of_article):
    lab = make_lab(torch.float32)
    assert found_by(lambda: reader_of(lab, kind=knows(of_article)), "only tokens count")


def test_audit_finds_a_last_segment_that_is_known_as_such():
    lab = make_lab(torch.float32)

    class Short(InnerLoop):
        def segment(self, inputs_S, targets_S, last=False):
            step = super().segment(inputs_S, targets_S, last)
            return step._replace(losses_S=step.losses_S * 0.99) if len(targets_S) < SIZE else step

    assert found_by(lambda: reader_of(lab, kind=Short), "only tokens count")


@pytest.mark.parametrize(("since", "share"), [(1, 1.0), (1, 0.01), (8, 0.01), (8, 1.0)])
def test_audit_finds_weights_that_survive_a_reset(since, share):
    lab = make_lab(torch.float32)

    class Keeps(InnerLoop):
        begun = 0

        def begin(self):
            kept = self.thetas[0].clone() if self.begun else None
            super().begin()
            self.begun += 1
            if self.begun > since + 1 and kept is not None:
                rows = max(1, int(share * kept.numel()))
                with torch.no_grad():
                    self.thetas[0].view(-1)[:rows].copy_(kept.view(-1)[:rows])

    assert found_by(lambda: reader_of(lab, kind=Keeps), "nothing of other articles")


@pytest.mark.parametrize("part", ["state", "hidden"])
def test_audit_finds_a_state_that_survives_a_reset(part):
    lab = make_lab(torch.float32)

    class Keeps(InnerLoop):
        def begin(self):
            kept = getattr(self, part, None)
            super().begin()
            if kept is not None:
                setattr(self, part, kept)

    rule = Adam(1e-2) if part == "state" else None
    assert found_by(lambda: reader_of(lab, kind=Keeps, rule=rule), "nothing of other articles")


@pytest.mark.parametrize("since", [0, 8])
def test_audit_finds_a_loss_of_the_future_in_the_context(since):
    """The update after a segment knows the loss of the next one."""
    lab = make_lab(torch.float32)

    class Foresees(InnerLoop):
        def read(self, article, start_id, progress=None):
            if self.config.reset == "article":
                self.begin()
            losses = []
            segments = list(article_segments(article.ids_T, start_id, SIZE))
            for number, (inputs_S, targets_S) in enumerate(segments):
                step = self.segment(inputs_S, targets_S, number == len(segments) - 1)
                losses.append(step.losses_S)
                if number >= since and number + 1 < len(segments):
                    with torch.no_grad():
                        coming = self.score(*segments[number + 1], self.hidden)[0].mean()
                        self.thetas[0].mul_(1 - 1e-4 * coming)
            return torch.cat(losses)

    assert found_by(lambda: reader_of(lab, kind=Foresees), "causality")


@pytest.mark.parametrize("how", ["functional", "module"])
def test_audit_finds_dropout_although_it_repeats(how):
    lab = make_lab(torch.float32)
    dropout = torch.nn.Dropout(0.2)
    lab[0].add_module("audited_dropout", dropout)

    def score(inputs_S, targets_S, hidden):
        losses_S, hidden = lab[1](inputs_S, targets_S, hidden)
        torch.manual_seed(0)
        dropped_S = dropout.train()(losses_S) if how == "module" else F.dropout(losses_S, 0.2, training=True)
        dropout.eval()
        return dropped_S, hidden

    assert found_by(lambda: reader_of(lab, score=score), "evaluation mode")


def test_audit_finds_a_memory_by_title():
    lab = make_lab(torch.float32)
    held = {}

    class Remembers(InnerLoop):
        def read(self, article, start_id, progress=None):
            losses_T = super().read(article, start_id, progress)
            before = held.get(article.title)
            held[article.title] = losses_T
            same = before is not None and before.shape == losses_T.shape
            return torch.minimum(losses_T, before - 0.01) if same else losses_T

    assert failing(lambda: reader_of(lab, kind=Remembers))


def test_quick_audit_reads_short_excerpts_only():
    lab, lengths = make_lab(torch.float32), []

    class Counts(InnerLoop):
        def read(self, article, start_id, progress=None):
            lengths.append(len(article))
            return super().read(article, start_id, progress)

    assert failing(lambda: reader_of(lab, kind=Counts), quick=True) == set()
    assert max(lengths) < 10 * SIZE
    lengths.clear()
    assert failing(lambda: reader_of(lab, kind=Counts)) == set()
    assert max(lengths) > 64 * SIZE
    assert any(dataclasses.replace(A).ids_T.numel() == length for length in lengths)  # one whole article
