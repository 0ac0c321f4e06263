"""Audits of the reading protocol: what must not move, does not move by a bit.

``audit`` takes any reader, with any rule, adapter, model or cache: a function that makes a fresh one each time.
It asks by perturbation and by counting, and trusts nothing that the reader says of itself
(:mod:`dynlm.evaluation.probe`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dynlm.evaluation.audit_articles import (
    LONG,
    RESETS,
    SHORT,
    TOLERANCE,
    Excerpts,
    MakeReader,
    Verdict,
    adds_up,
    excerpt,
    lengthened,
    no_later_article,
    tokens_only,
    verdict,
)
from dynlm.evaluation.probe import (
    Draws,
    Note,
    altered,
    ask_inside_segments,
    ask_vocabulary,
    first_difference,
    read,
    training_modules,
)
from dynlm.inner import InnerLoop, Scored
from dynlm.optim.base import Rule
from dynlm.types import TokenizedArticle

__all__ = ["Verdict", "adds_up", "audit", "excerpt", "first_leak", "restores", "verdicts"]

REREADINGS = 16  # readings with altered tokens, spread over the long excerpt
MOST_TOKENS = 20_000  # of any excerpt, however long a window is
MOST_QUESTIONS = 2_048  # about altered segments; and, of a model without logits, scores of the vocabulary


def audit(
    make_reader: MakeReader,
    article: TokenizedArticle,
    later: TokenizedArticle,
    start_id: int,
    vocab_size: int,
    *,
    quick: bool = False,
    window: int | None = None,
) -> list[Verdict]:
    """Run every check; ``later`` is read after ``article``.

    ``make_reader`` gives a new reader each time, at the start of reading. Most checks read short excerpts; causality is
    also asked in a long one of at least 64 segments and twice ``window`` tokens (None: the longest window found in the
    reader's cache and scorer), made of the tokens of both articles, and the whole of ``article`` is read for its sums.
    ``quick`` stays with the short excerpts: a tenth of the time, and blind to what happens only later on.
    """
    return list(verdicts(make_reader, article, later, start_id, vocab_size, quick=quick, window=window))


def verdicts(
    make_reader: MakeReader,
    article: TokenizedArticle,
    later: TokenizedArticle,
    start_id: int,
    vocab_size: int,
    *,
    quick: bool = False,
    window: int | None = None,
) -> Iterator[Verdict]:
    """Yield the verdicts of :func:`audit` as they are found."""
    reader = make_reader()
    size = reader.config.segment
    tokens = SHORT * size if quick else max(LONG * size, 2 * (window or _window(reader)))
    long = lengthened(article, later, min(tokens, MOST_TOKENS), size)
    parts = Excerpts(excerpt(article, size), excerpt(later, size), long)
    whole = parts.short if quick or len(article) > MOST_TOKENS else article
    yield no_later_article(make_reader, parts, start_id, 2 if quick else RESETS)  # first: a hidden memory is empty yet
    yield repeatable(make_reader, long, start_id)
    yield tokens_only(make_reader, parts, start_id)  # one reading or few: what is wrong shows early
    yield scored_once(make_reader(), whole, start_id)
    yield nothing_drawn(make_reader(), parts.short, start_id)
    yield sums_to_one(make_reader, long if len(long) > len(whole) else whole, start_id, vocab_size)
    yield causal_inside(make_reader, long, start_id, vocab_size)
    yield causal(make_reader, long, start_id, vocab_size)
    yield restored(make_reader, parts.short, start_id)
    yield zero_rate(make_reader, parts.short, start_id)


def _window(reader: InnerLoop) -> int:
    """Return the longest window that the reader's parts name, in tokens; 0 without any."""
    parts = (reader.score, getattr(reader, "cache", None), reader)
    return max((w for part in parts if isinstance(w := getattr(part, "window", None), int)), default=0)


def first_leak(
    reader: InnerLoop, article: TokenizedArticle, start_id: int, position: int, vocab_size: int
) -> int | None:
    """Return the first position before ``position`` whose score moves when the tokens from ``position`` on change.

    Tokens at and after ``position`` are replaced by others, the article is read again from the same start, and the
    scores before it are compared bit for bit. None: causal as far as this perturbation can tell.
    """
    other = altered(article, position, vocab_size)
    return first_difference(*(read(reader, text, start_id).losses_T[:position] for text in (article, other)))


def restores(reader: InnerLoop, article: TokenizedArticle, start_id: int) -> bool:
    """Return whether every weight of the model is bit for bit what it was, after reading."""
    saved = _weights(reader.model)
    with reader:
        reader.read(article, start_id)
    return _same(saved, reader.model)


def repeatable(make_reader: MakeReader, article: TokenizedArticle, start_id: int) -> Verdict:
    """Check that two readings give the same bits; all other comparisons rest on this."""
    place = first_difference(*(read(make_reader(), article, start_id).losses_T for _ in range(2)))
    return verdict("repeatable", place is None, "two readings, the same bits", f"scores differ from token {place} on")


def causal(make_reader: MakeReader, article: TokenizedArticle, start_id: int, vocab_size: int) -> Verdict:
    """Check that scores before t, and the distribution of t, do not move when the tokens from t on change.

    t lies inside and at the borders of segments: at fixed places of the first ones, and at drawn places of
    others, in every residue of segments modulo eight. Each reading ends with the altered segment, but for a few.
    """
    name, reader = "causality", make_reader()
    size, n = reader.config.segment, len(article)
    fixed = {1, size // 2, size - 1, size, size + 1, 2 * size, 3 * size + size // 2, n - size // 4, n - 1}
    positions = sorted({t for t in fixed if 0 < t < n} | set(_drawn(size, n)))
    whole = read(reader, article, start_id, positions)
    for number, t in enumerate(positions):
        other = altered(article, t, vocab_size)
        if number % 8:  # what looks further ahead than the segment is found by the others
            other = dataclasses.replace(other, ids_T=other.ids_T[: (t // size + 2) * size])
        found = read(make_reader(), other, start_id, [t])
        place = first_difference(whole.losses_T[:t], found.losses_T[:t])
        if place is not None:
            return Verdict(name, False, f"the score of token {place} moves with the tokens from {t} on")
        if t in found.log_probs_V and not torch.equal(found.log_probs_V[t], whole.log_probs_V[t]):
            return Verdict(name, False, f"the distribution of token {t} moves with that token and later ones")
    return Verdict(name, True, f"{len(positions)} readings altered from a token on, of {n}: nothing before it moves")


def _drawn(size: int, n: int) -> Iterator[int]:
    """Yield a place in each of some segments, spread over the article; each residue modulo eight comes in turn."""
    segments, generator = n // size, torch.Generator().manual_seed(0)
    if segments <= SHORT:
        return
    for k in range(REREADINGS):
        number = (k * segments // REREADINGS) // 8 * 8 + k % 8
        yield min(number, segments - 1) * size + int(torch.randint(1, size + 1, (), generator=generator)) - (size == 1)


def causal_inside(make_reader: MakeReader, article: TokenizedArticle, start_id: int, vocab_size: int) -> Verdict:
    """Check causality inside every segment: at its last token, at two drawn ones, and once for each known token."""
    name, size = "causality in each segment", make_reader().config.segment
    firsts = {int(token): t for t, token in reversed(list(enumerate(article.ids_T.tolist())))}
    generator = torch.Generator().manual_seed(1)
    drawn_N = torch.randint(1, max(2, size), (2 * -(-len(article) // size),), generator=generator).tolist()
    drawn = {number // 2 * size + place for number, place in enumerate(drawn_N)}
    places = sorted({*firsts.values(), *drawn, *range(size - 1, len(article), size)})
    places = [t for t in places if t < len(article)]
    places = places[:: -(-len(places) // MOST_QUESTIONS)]
    losses_T, found = ask_inside_segments(make_reader(), article, start_id, places, vocab_size)
    if found is not None:
        what = "distribution" if found.distribution else "score"
        return Verdict(name, False, f"the {what} of token {found.token} moves with the tokens from {found.changed} on")
    if first_difference(losses_T, read(make_reader(), article, start_id).losses_T) is not None:
        return Verdict(name, True, "not asked: this reader cannot be put back to a snapshot")
    return Verdict(name, True, f"{len(places)} altered segments, every token of the text once: nothing before it moves")


def sums_to_one(make_reader: MakeReader, article: TokenizedArticle, start_id: int, vocab_size: int) -> Verdict:
    """Check that each score is −log p(target) of a distribution that sums to one, a mixture's included."""
    name, worst, shows = "probabilities sum to one", 0.0, True

    def compare(scored: Scored, log_probs_SV: Tensor | None) -> None:
        nonlocal worst, shows
        if log_probs_SV is None:
            shows = False
            return
        worst = max(worst, _off(log_probs_SV, scored.targets_S, scored.losses_S))

    reader = make_reader()
    with reader.observed_by(Note(compare)):
        read(reader, article, start_id)
    said = f"all {len(article)} tokens"
    if not shows:  # ask for every token in turn, in segments all over the text
        worst, asked = _asked(make_reader(), article, start_id, vocab_size)
        said = f"{asked} tokens, asked for the whole vocabulary"
    return verdict(name, worst <= TOLERANCE, f"{said}, off by {worst:.1e} nats at most", f"off by {worst:.1e} nats")


def _asked(reader: InnerLoop, article: TokenizedArticle, start_id: int, vocab_size: int) -> tuple[float, int]:
    """Return how far the scores of a model without logits are from a sum of one, and of how many tokens."""
    segments = -(-len(article) // reader.config.segment)
    count = min(segments, max(3, 4 * MOST_QUESTIONS // vocab_size))
    numbers = {k * (segments - 1) // max(1, count - 1) for k in range(count)}
    worst, asked = 0.0, 0
    for log_probs_SV, targets_S, losses_S in ask_vocabulary(reader, article, start_id, vocab_size, numbers):
        worst, asked = max(worst, _off(log_probs_SV, targets_S, losses_S)), asked + targets_S.numel()
    return worst, asked


def _off(log_probs_SV: Tensor, targets_S: Tensor, losses_S: Tensor) -> float:
    """Return by how many nats distributions miss a sum of one, or the scores said to be theirs."""
    total = log_probs_SV.logsumexp(1).abs().max()
    off = (log_probs_SV.gather(1, targets_S[:, None])[:, 0] + losses_S).abs().max()
    return float(torch.maximum(total, off).nan_to_num(nan=torch.inf))


def scored_once(reader: InnerLoop, article: TokenizedArticle, start_id: int) -> Verdict:
    """Check that the segments' targets are the article, inputs the tokens before, and the scores what was returned."""
    name, seen = "every token scored once", list[Scored]()
    with reader.observed_by(Note(lambda scored, _: seen.append(scored._replace(mean=None, log_probs=None)))):
        losses_T = read(reader, article, start_id).losses_T
    if not seen:
        return Verdict(name, False, "no segment was scored")
    inputs_T = torch.cat([scored.inputs_S.cpu() for scored in seen])
    targets_T = torch.cat([scored.targets_S.cpu() for scored in seen])
    scores_T = torch.cat([scored.losses_S.cpu() for scored in seen])
    before_T = torch.cat([article.ids_T.new_tensor([start_id]), article.ids_T[:-1]])
    ok = torch.equal(targets_T, article.ids_T) and torch.equal(inputs_T, before_T)
    wrong = f"{targets_T.numel()} tokens scored, {losses_T.numel()} scores, {len(article)} tokens in the article"
    if ok and losses_T.shape == scores_T.shape and (place := first_difference(losses_T, scores_T)) is not None:
        return Verdict(
            name, False, f"token {place} was scored {scores_T[place]:.6g} and returned {losses_T[place]:.6g}"
        )
    ok = ok and losses_T.shape == article.ids_T.shape
    return verdict(name, ok, f"{len(article)} tokens in {len(seen)} segments, returned as scored", wrong)


def nothing_drawn(reader: InnerLoop, article: TokenizedArticle, start_id: int) -> Verdict:
    """Check that the model is in evaluation mode and that nothing is drawn at random while it scores."""
    name, training = "evaluation mode", set[str]()

    def look(scored: Scored, log_probs_SV: Tensor | None) -> None:
        training.update(
            m or type(reader.model).__name__ for m, module in reader.model.named_modules() if module.training
        )

    with reader.observed_by(Note(look)), Draws() as draws, training_modules(reader.model) as ran:
        read(reader, article, start_id)
    if draws.found or training or ran:
        where = f"torch ran {draws.found}" if draws.found else f"{sorted(training | set(ran))[0]} is in training mode"
        return Verdict(name, False, f"{where} while tokens were scored")
    return Verdict(name, True, "no module in training mode, no random numbers")


class _InterruptedError(Exception):
    pass


def restored(make_reader: MakeReader, article: TokenizedArticle, start_id: int) -> Verdict:
    """Check all weights and buffers of the model after reading, and after an exception in the middle of it."""
    reader = make_reader()
    saved = _weights(reader.model)
    read(reader, article, start_id)
    if not _same(saved, reader.model):
        return Verdict("weights restored", False, "reading leaves other weights behind")
    reader, count = make_reader(), 0

    def interrupt(scored: Scored, log_probs_SV: Tensor | None) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise _InterruptedError

    try:
        with reader.observed_by(Note(interrupt)):
            read(reader, article, start_id)
    except _InterruptedError:
        pass
    ok = _same(saved, reader.model)
    return verdict("weights restored", ok, "also after an exception", "an exception leaves other weights behind")


def zero_rate(make_reader: MakeReader, article: TokenizedArticle, start_id: int) -> Verdict:
    """Check that with a learning rate of zero the scores are those of static reading, bit for bit."""
    name = "zero rate equals static"
    reader = make_reader()
    rate, zero = next(_rates(reader.rule), (None, 0.0))
    if rate is None:
        return Verdict(name, True, f"not asked: {reader.rule.name} has no rate")
    saved = rate.detach().clone()
    try:
        with torch.no_grad():
            rate.fill_(zero)
        still_T = read(reader, article, start_id).losses_T
    finally:
        with torch.no_grad():
            rate.copy_(saved)
    reader = make_reader()
    reader.learns = False
    place = first_difference(read(reader, article, start_id).losses_T, still_T)
    return verdict(name, place is None, "the same bits", f"scores differ from token {place} on")


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _same(saved: dict[str, Tensor], model: nn.Module) -> bool:
    now = model.state_dict()
    return saved.keys() == now.keys() and all(torch.equal(value, now[name]) for name, value in saved.items())


def _rates(rule: Rule) -> Iterator[tuple[Tensor, float]]:
    """Yield the parameter that holds the learning rate, and the value that makes it zero.

    2^-120 stands for zero where the logarithm is kept: no weight of float32 moves by it, and rules that divide by their
    rate still can.
    """
    for name, zero in (("lr", 0.0), ("log2_lr", -120.0)):
        parameter = getattr(rule, name, None)
        if isinstance(parameter, Tensor):
            yield parameter, zero
