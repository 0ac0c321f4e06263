"""Checks of the audit that read articles in other ways: shorter, longer, renamed, many in a row; and counts of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlm.evaluation.probe import first_difference, read
from dynlm.inner import InnerLoop
from dynlm.types import Article, TokenizedArticle

MakeReader = Callable[[], InnerLoop]
TOLERANCE = 1e-4
"""nats by which a score may differ from that of a distribution that sums to one"""
SHORT, LONG = 6, 64  # segments of an excerpt, and of the long one
RESETS = 16  # short articles read in a row


class Verdict(NamedTuple):
    """One check, and in one line what was seen."""

    name: str
    passed: bool
    detail: str


def verdict(name: str, passed: bool, right: str, wrong: str) -> Verdict:
    return Verdict(name, passed, right if passed else wrong)


class Excerpts(NamedTuple):
    """What the checks read: a few segments, and enough for every window to be full twice."""

    short: TokenizedArticle
    later: TokenizedArticle
    long: TokenizedArticle


def excerpt(article: TokenizedArticle, segment: int, segments: int = SHORT) -> TokenizedArticle:
    """Return the first segments of an article and half of one more, so that the last one is short."""
    return dataclasses.replace(article, ids_T=article.ids_T[: segments * segment + max(1, segment // 2)])


def lengthened(article: TokenizedArticle, later: TokenizedArticle, tokens: int, segment: int) -> TokenizedArticle:
    """Return at least ``tokens`` tokens and half a segment: both articles in turn, as often as it takes."""
    length = -(-tokens // segment) * segment + max(1, segment // 2)
    both_T = torch.cat([article.ids_T, later.ids_T])
    return dataclasses.replace(article, ids_T=both_T.repeat(-(-length // both_T.numel()))[:length])


def tokens_only(make_reader: MakeReader, parts: Excerpts, start_id: int) -> Verdict:
    """Check that scores depend on the tokens before alone: not on length, title, id, words or bytes of the article."""
    name, article = "only tokens count", parts.short
    size, n = make_reader().config.segment, len(article)
    whole_T = read(make_reader(), article, start_id).losses_T
    for what, change in _renamed(article):
        found_T = read(make_reader(), dataclasses.replace(article, **change), start_id).losses_T
        if (place := first_difference(whole_T, found_T)) is not None:
            return Verdict(name, False, f"the score of token {place} moves with the article's {what}")
    longer_T = torch.cat([article.ids_T, parts.later.ids_T[: 3 * size]])
    lengths = sorted({length for length in (size, 2 * size, 2 * size + 1, n - n % size, len(longer_T)) if length > 0})
    for length in lengths:
        found_T = read(make_reader(), dataclasses.replace(article, ids_T=longer_T[:length]), start_id).losses_T
        shared = min(length, n)
        exact = (shared - 1) // size * size  # the shorter one's last segment may be scored in another way, to rounding
        place = first_difference(whole_T[:exact], found_T[:exact])
        off_S = (whole_T[exact:shared] - found_T[exact:shared]).abs()
        if place is None and float(off_S.max()) > _rounding(whole_T) and not _full(make_reader(), shared):
            place = exact + int(off_S.argmax())
        if place is not None:
            return Verdict(name, False, f"the score of token {place} moves with the article's length ({length}, {n})")
    return Verdict(name, True, f"the same scores with other counts, id, title, and lengths {lengths}")


def _renamed(article: TokenizedArticle) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (what, changes) of what is no token; several of each, as a hash of one may meet that of another."""
    for factor, more in ((3, 7), (1, 1), (0, 1)):
        counts = {"n_words": factor * article.n_words + more, "n_bytes": factor * article.n_bytes + 2 * more}
        yield "counts of words and bytes", counts
    for name in ("audit", f"{article.title}!", ""):
        yield "id and title", {"id": name, "title": name}


def _rounding(losses_T: Tensor) -> float:
    return TOLERANCE if losses_T.dtype in (torch.float32, torch.float64) else 500 * TOLERANCE


def _full(reader: InnerLoop, tokens: int) -> bool:
    """Return whether the scorer's window is full: a short segment then sees more of the text before it."""
    window = getattr(reader.score, "window", None)
    return isinstance(window, int) and tokens > window


def no_later_article(make_reader: MakeReader, parts: Excerpts, start_id: int, resets: int) -> Verdict:
    """Check that an article has the same scores alone, before others, and (with resets) after them."""
    name, reader = "nothing of other articles", make_reader()
    article, later, size = parts.short, parts.later, reader.config.segment
    row = [article, later, *(_short(parts, k, size) for k in range(resets - 2)), article]
    if reader.config.reset == "never":
        row = row[:2]
    with reader:
        together = [reader.read(one, start_id).cpu() for one in row]
    alone: dict[int, Tensor] = {}
    for number, (one, found_T) in enumerate(zip(row, together, strict=True)):
        if number and reader.config.reset == "never":
            break  # a stream goes on from what was read before
        key = id(one)  # two articles may have the same name
        alone[key] = alone[key] if key in alone else read(make_reader(), one, start_id).losses_T
        if (place := first_difference(found_T, alone[key])) is not None:
            where = f"before {later.title!r}" if number == 0 else f"as number {number + 1} in a row"
            return Verdict(name, False, f"token {place} of {one.title!r} has another score {where} than alone")
    said = f"alone and among {len(row) - 1} others in a row" if len(row) > 2 else "alone and before another"
    return Verdict(name, True, said)


def _short(parts: Excerpts, k: int, size: int) -> TokenizedArticle:
    """Return one of many short articles: two segments and a half from somewhere in the long excerpt."""
    start = (3 * k * size) % max(1, len(parts.long) - 3 * size)
    ids_T = parts.long.ids_T[start : start + 2 * size + max(1, size // 2)]
    return dataclasses.replace(parts.long, id=f"short {k}", title=f"short {k}", ids_T=ids_T)


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
    return verdict(name, ok, f"{words} words, {n_bytes} bytes", wrong)
