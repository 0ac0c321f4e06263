"""Articles of an evaluation token by token: those that a reader names, or the most, middle and least gained ones."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from dynlm.files import Json
from dynlm.methods import STATIC
from dynlm.report.evaluation import Evaluation
from dynlm.report.plots import article_spans
from dynlm.report.tokens import tokens
from dynlm.report.words import Occurrences, extremes
from dynlm.types import InputError

Pieces = Callable[[Sequence[int]], list[str]]
"""the text that each token stands for"""
WORDS = 8  # that came again, in the table
MAP_TOKENS = 4096  # of an article: more is no pleasure to read, and makes the page slow


class Chosen(NamedTuple):
    """An article of the token map."""

    why: str
    article: int
    start: int
    stop: int
    tokens: int
    """of the whole article, which may be longer than what is shown"""


def token_maps(evaluation: Evaluation, pieces: Pieces | None, titles: Sequence[str] = ()) -> Json | None:
    """Return what the page needs of the maps, the losses of every method among it; None where the tokens are not known.

    Raises:
        InputError: a title that is none of the articles'.
    """
    if evaluation.ids_T is None or not evaluation.shown or pieces is None:
        return None
    best = _mapped(evaluation)
    names = evaluation.names
    articles: list[Json] = []
    losses: dict[str, list[list[int]]] = {name: [] for name in names}
    everything: list[tuple[str, float, float]] = []
    static_T, best_T = evaluation.losses[STATIC], evaluation.losses[best]
    for chosen in _named(evaluation, titles) or _choose(evaluation, best):
        here = slice(chosen.start, chosen.stop)
        texts = pieces(evaluation.ids_T[here].tolist())
        everything += list(zip(texts, static_T[here].tolist(), best_T[here].tolist(), strict=True))
        articles.append(
            {
                "title": evaluation.titles[chosen.article],
                "why": chosen.why,
                "tokens": chosen.tokens,
                "shown": chosen.stop - chosen.start,
                "gain": float((static_T[here] - best_T[here]).mean()),
                "html": tokens(texts, static_T[here].tolist(), best_T[here].tolist()),
            }
        )
        for name in names:
            losses[name].append((1000 * evaluation.losses[name][here]).round().astype(int).tolist())
    return {
        "best": best,
        "chosen": bool(titles),
        "names": names,
        "articles": articles,
        "losses": json.dumps(losses, separators=(",", ":")).replace("<", "\\u003c"),
        "extremes": extremes(everything),
    }


def words_again(evaluation: Evaluation, pieces: Pieces | None) -> Json | None:
    """Return the words that static expected least and that an article uses again, with what static and the best rule
    lost at each occurrence; None where the tokens are not known, or no word came again.

    ``best``, ``words`` and ``mean`` (dynlm.report.words).
    """
    if evaluation.ids_T is None or not evaluation.shown or pieces is None:
        return None
    best, occurrences = _mapped(evaluation), Occurrences(WORDS)
    static_T, best_T = evaluation.losses[STATIC], evaluation.losses[best]
    for start, stop in article_spans(evaluation.article_T):
        here = slice(start, stop)
        occurrences.add(pieces(evaluation.ids_T[here].tolist()), static_T[here].tolist(), best_T[here].tolist())
        occurrences.end_text()
    words = occurrences.rows()
    return {"best": best, "words": words, "mean": occurrences.mean(), "limit": occurrences.limit} if words else None


def _mapped(evaluation: Evaluation) -> str:
    """Return the method whose map is shown first. A cache takes a little from every token that it does not hold, which
    reddens the whole map."""
    return evaluation.best("learned", alone=True) or evaluation.shown[-1]


def require_titles(chosen: Sequence[str], known: Collection[str]) -> None:
    """Refuse titles of articles that are not read.

    Raises:
        InputError: with the nearest that is.
    """
    for title in chosen:
        if title not in known:
            close = difflib.get_close_matches(title, known, n=1, cutoff=0.0)
            message = f"article {title!r} was not read: did you mean {close[0]!r}?"
            raise InputError(message, setting="report.articles")


def _named(evaluation: Evaluation, titles: Sequence[str]) -> list[Chosen]:
    """Return the articles with these titles."""
    spans = {evaluation.titles[evaluation.article_T[span[0]]]: span for span in article_spans(evaluation.article_T)}
    chosen = []
    require_titles(titles, spans)
    for title in titles:
        start, stop = spans[title]
        article = int(evaluation.article_T[start])
        chosen.append(Chosen("chosen", article, start, min(stop, start + MAP_TOKENS), stop - start))
    return chosen


def _choose(evaluation: Evaluation, method: str) -> list[Chosen]:
    """Return the articles where ``method`` gains most, in the middle, and least, among those of a readable length."""
    spans = article_spans(evaluation.article_T)
    gain_T = evaluation.gains[method]
    fit = [span for span in spans if span[1] - span[0] <= MAP_TOKENS] or spans
    order = sorted(fit, key=lambda span: float(gain_T[slice(*span)].mean()))
    why = {0: "the least gained", len(order) // 2: "the middle", len(order) - 1: "the most gained"}
    if len(order) == 1:
        why = {0: "the only one"}
    return [
        Chosen(text, int(evaluation.article_T[start]), start, min(stop, start + MAP_TOKENS), stop - start)
        for place, text in sorted(why.items(), reverse=True)
        for start, stop in [order[place]]
    ]
