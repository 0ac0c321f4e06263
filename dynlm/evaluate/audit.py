"""Audits of the reading protocol: what must not move, does not move by a bit.

``audit`` takes any reader, with any rule, adapter, model or cache: a function that makes a fresh one each time.
It asks by perturbation and by counting, and trusts nothing that the reader says of itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynlm.adapt import Reader, Step
from dynlm.evaluate.tap import Tap, TappedReader
from dynlm.optim.base import Rule
from dynlm.optim.handmade import Static
from dynlm.types import Article, InputError, TokenizedArticle

MakeReader = Callable[[], Reader]
TOLERANCE = 1e-4
"""nats by which a score may differ from that of a distribution that sums to one"""


class Verdict(NamedTuple):
    """One check, and in one line what was seen."""

    name: str
    passed: bool
    detail: str


def audit(
    make_reader: MakeReader, article: TokenizedArticle, later: TokenizedArticle, start_id: int, vocab_size: int
) -> list[Verdict]:
    """Every check on excerpts of some segments (:func:`excerpt`); ``later`` is read after ``article``.

    ``make_reader`` gives a new reader each time, at the start of reading.
    """
    later_ones = no_later_article(make_reader, article, later, start_id)  # first: a hidden memory is still empty
    return [
        later_ones,
        repeatable(make_reader, article, start_id),
        causal(make_reader, article, start_id, vocab_size),
        sums_to_one(make_reader(), article, start_id, vocab_size),
        scored_once(make_reader(), article, start_id),
        restored(make_reader, article, start_id),
        zero_rate(make_reader, article, start_id),
    ]


def excerpt(article: TokenizedArticle, segment: int, segments: int = 6) -> TokenizedArticle:
    """The first segments of an article and half of one more, so that the last one is short."""
    return dataclasses.replace(article, ids_T=article.ids_T[: segments * segment + max(1, segment // 2)])


def first_leak(reader: Reader, article: TokenizedArticle, start_id: int, position: int, vocab_size: int) -> int | None:
    """The first position before ``position`` whose score moves when the tokens from ``position`` on change.

    Tokens at and after ``position`` are replaced by others, the article is read again from the same start, and the
    scores before it are compared bit for bit. None: causal as far as this perturbation can tell.
    """
    other = _changed(article, position, vocab_size)
    with reader:
        reader.begin()
        before = reader.read(article, start_id)[:position]
        reader.begin()
        after = reader.read(other, start_id)[:position]
    return _first_difference(before, after)


def restores(reader: Reader, article: TokenizedArticle, start_id: int) -> bool:
    """Whether every weight of the model is bit for bit what it was, after reading."""
    saved = _weights(reader.model)
    with reader:
        reader.read(article, start_id)
    return _same(saved, reader.model)


def repeatable(make_reader: MakeReader, article: TokenizedArticle, start_id: int) -> Verdict:
    """Two readings give the same bits; all other comparisons rest on this."""
    place = _first_difference(*(_read(make_reader(), article, start_id) for _ in range(2)))
    return _verdict("repeatable", place is None, "two readings, the same bits", f"scores differ from token {place} on")


def causal(make_reader: MakeReader, article: TokenizedArticle, start_id: int, vocab_size: int) -> Verdict:
    """Scores before t do not move when the tokens from t on change; t inside and at the borders of segments."""
    reader = make_reader()
    size, n = reader.config.segment, len(article)
    wanted = {1, size // 2, size - 1, size, size + 1, 2 * size, 3 * size + size // 2, n - size // 4, n - 1}
    positions = sorted(t for t in wanted if 0 < t < n)
    whole = _read(reader, article, start_id)
    for t in positions:
        other = _read(make_reader(), _changed(article, t, vocab_size), start_id)
        place = _first_difference(whole[:t], other[:t])
        if place is not None:
            return Verdict("causality", False, f"the score of token {place} moves with the tokens from {t} on")
    return Verdict("causality", True, f"scores before tokens {', '.join(map(str, positions))} stand still")


def sums_to_one(reader: Reader, article: TokenizedArticle, start_id: int, vocab_size: int) -> Verdict:
    """Each score is −log p(target) of a distribution over the vocabulary that sums to one, a mixture's included."""
    name, worst = "probabilities sum to one", 0.0

    def compare(log_probs_SV: Tensor, losses_S: Tensor, targets_S: Tensor) -> None:
        nonlocal worst
        total = log_probs_SV.logsumexp(1).abs().max()
        off = (log_probs_SV.gather(1, targets_S[:, None])[:, 0] + losses_S).abs().max()
        found = max(float(total), float(off))
        worst = found if found != found else max(worst, found)

    try:
        with _distributions(reader, compare):
            _read(reader, article, start_id)
        seen = f"all {len(article)} tokens"
    except InputError:  # a model that shows no logits: ask it for every token in turn
        first_S = torch.cat([article.ids_T.new_tensor([start_id]), article.ids_T[:1]])
        inputs_S = first_S.to(reader.parameters[0].device)
        with reader, torch.no_grad():
            reader.begin()
            log_probs = [-reader.score(inputs_S, torch.full_like(inputs_S, v), None)[0] for v in range(vocab_size)]
        worst, seen = float(torch.stack(log_probs).logsumexp(0).abs().max()), "two tokens"
    return _verdict(name, worst <= TOLERANCE, f"{seen}, off by {worst:.1e} nats at most", f"off by {worst:.1e} nats")


def scored_once(reader: Reader, article: TokenizedArticle, start_id: int) -> Verdict:
    """The segments' targets, one after the other, are the article; inputs are the tokens before; one score each."""
    name = "every token scored once"
    inputs: list[Tensor] = []
    targets: list[Tensor] = []

    def note(step: Step, inputs_S: Tensor, targets_S: Tensor) -> None:
        inputs.append(inputs_S.cpu())
        targets.append(targets_S.cpu())

    with _noting(reader, note):
        losses_T = _read(reader, article, start_id)
    scored = torch.cat(targets) if targets else article.ids_T[:0]
    before = torch.cat([article.ids_T.new_tensor([start_id]), article.ids_T[:-1]])
    ok = torch.equal(scored, article.ids_T) and torch.equal(torch.cat(inputs), before)
    ok = ok and losses_T.shape == article.ids_T.shape
    wrong = f"{scored.numel()} tokens scored, {losses_T.numel()} scores, {len(article)} tokens in the article"
    return _verdict(name, ok, f"{len(article)} tokens in {len(targets)} segments", wrong)


class _InterruptedError(Exception):
    pass


def restored(make_reader: MakeReader, article: TokenizedArticle, start_id: int) -> Verdict:
    """All weights and buffers of the model after reading, and after an exception in the middle of it."""
    reader = make_reader()
    saved = _weights(reader.model)
    _read(reader, article, start_id)
    if not _same(saved, reader.model):
        return Verdict("weights restored", False, "reading leaves other weights behind")
    reader, count = make_reader(), 0

    def interrupt(step: Step, inputs_S: Tensor, targets_S: Tensor) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise _InterruptedError

    try:
        with _noting(reader, interrupt):
            _read(reader, article, start_id)
    except _InterruptedError:
        pass
    ok = _same(saved, reader.model)
    return _verdict("weights restored", ok, "also after an exception", "an exception leaves other weights behind")


def zero_rate(make_reader: MakeReader, article: TokenizedArticle, start_id: int) -> Verdict:
    """With a learning rate of zero the scores are those of static reading, bit for bit."""
    name = "zero rate equals static"
    reader = make_reader()
    rate, zero = next(_rates(reader.rule), (None, 0.0))
    if rate is None:
        return Verdict(name, True, f"not asked: {reader.rule.name} has no rate")
    saved = rate.detach().clone()
    try:
        with torch.no_grad():
            rate.fill_(zero)
        still = _read(reader, article, start_id)
    finally:
        with torch.no_grad():
            rate.copy_(saved)
    reader = make_reader()
    reader.rule = Static()
    place = _first_difference(_read(reader, article, start_id), still)
    return _verdict(name, place is None, "the same bits", f"scores differ from token {place} on")


def no_later_article(
    make_reader: MakeReader, article: TokenizedArticle, later: TokenizedArticle, start_id: int
) -> Verdict:
    """An article's scores are the same whether it is read alone, before another one, or (reset ``article``) after."""
    name, reader = "nothing of later articles", make_reader()
    with reader:
        reader.begin()
        before = reader.read(article, start_id).cpu()
        reader.read(later, start_id)
        again = reader.read(article, start_id).cpu() if reader.config.reset == "article" else before
    alone = _read(make_reader(), article, start_id)
    if (place := _first_difference(before, alone)) is not None:
        return Verdict(name, False, f"token {place} has another score before {later.title!r} than alone")
    place = _first_difference(again, before)
    said = "alone, before and after another one" if reader.config.reset == "article" else "alone and before another"
    return _verdict(name, place is None, said, f"token {place} has another score after {later.title!r} was read")


def adds_up(text: Article, article: TokenizedArticle, decode: Callable[[Sequence[int]], str] | None = None) -> Verdict:
    """Words (with one end-of-line a line) and bytes are those of the raw text, and the tokens spell as many words."""
    name, raw = "words and bytes add up", text.text
    words = sum(len(line.split()) + 1 for line in raw.removesuffix("\n").split("\n"))
    n_bytes = sum(len(character.encode()) for character in raw)
    spelt = len(decode(article.ids_T.tolist()).split()) if decode else len(raw.split())
    ok = (words, n_bytes, len(raw.split())) == (article.n_words, article.n_bytes, spelt)
    wrong = (
        f"{text.title!r} has {words} words and {n_bytes} bytes, {article.n_words} and {article.n_bytes} are counted, "
        f"and its tokens spell {spelt} of {len(raw.split())} words"
    )
    return _verdict(name, ok, f"{words} words, {n_bytes} bytes", wrong)


def _verdict(name: str, passed: bool, right: str, wrong: str) -> Verdict:
    return Verdict(name, passed, right if passed else wrong)


def _changed(article: TokenizedArticle, position: int, vocab_size: int) -> TokenizedArticle:
    """Other tokens from ``position`` on."""
    ids_T = article.ids_T.clone()
    ids_T[position:] = (ids_T[position:] + 1) % vocab_size
    return dataclasses.replace(article, ids_T=ids_T)


def _read(reader: Reader, article: TokenizedArticle, start_id: int) -> Tensor:
    with reader:
        reader.begin()
        return reader.read(article, start_id).cpu()


def _first_difference(a_T: Tensor, b_T: Tensor) -> int | None:
    if a_T.shape != b_T.shape:
        return min(a_T.numel(), b_T.numel())
    moved = (a_T != b_T).nonzero()
    return int(moved[0]) if moved.numel() else None


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _same(saved: dict[str, Tensor], model: nn.Module) -> bool:
    now = model.state_dict()
    return saved.keys() == now.keys() and all(torch.equal(value, now[name]) for name, value in saved.items())


def _rates(rule: Rule) -> Iterator[tuple[Tensor, float]]:
    """The parameter that holds the learning rate, and the value that makes it zero.

    2^-120 stands for zero where the logarithm is kept: no weight of float32 moves by it, and rules that divide by their
    rate still can.
    """
    for name, zero in (("lr", 0.0), ("log2_lr", -120.0)):
        parameter = getattr(rule, name, None)
        if isinstance(parameter, Tensor):
            yield parameter, zero


@contextmanager
def _noting(reader: Reader, note: Callable[[Step, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, ``note`` is told of every segment that ``reader`` scores."""
    segment = reader.segment

    def noted(inputs_S: Tensor, targets_S: Tensor, last: bool = False) -> Step:
        step = segment(inputs_S, targets_S, last)
        note(step, inputs_S, targets_S)
        return step

    reader.segment = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        del reader.segment


@contextmanager
def _distributions(reader: Reader, see: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, ``see`` gets (log_probs_SV, losses_S, targets_S) of every segment."""
    if isinstance(reader, TappedReader):
        shown: list[Tensor] = []
        reader.watch = lambda log_probs_SV, targets_S: shown.append(log_probs_SV)
        with _noting(reader, lambda step, inputs_S, targets_S: see(shown.pop(), step.losses_S, targets_S)):
            yield
        reader.watch = None
        return
    with Tap(reader.model) as tap:

        def note(step: Step, inputs_S: Tensor, targets_S: Tensor) -> None:
            see(tap.logits(targets_S.numel()).log_softmax(1), step.losses_S, targets_S)
            tap.clear()

        with _noting(reader, note):
            yield
