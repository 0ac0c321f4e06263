"""What was read: the losses of every token with and without learning, and the page and figures made from them.

On streams memory stays flat where neither tokens nor words are asked for; of words a bounded table is kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import dynlm
from dynlm.files import Json
from dynlm.lazy import optional
from dynlm.optim.base import Rule
from dynlm.printable import printable
from dynlm.report.words import Occurrences
from dynlm.session.totals import Totals
from dynlm.types import InputError

if TYPE_CHECKING:
    import pandas

    from dynlm.session.session import Session

WORDS = 20
"""rows of the table of words"""


class Token(NamedTuple):
    """A token: its stretch of the text, and its losses in nats without and with learning."""

    text: str
    static: float
    adapted: float

    @property
    def gain(self) -> float:
        """Nats that learning took off."""
        return self.static - self.adapted


@dataclass
class Record:
    """Every token of all texts."""

    texts: list[str] = field(default_factory=list)
    static: array[float] = field(default_factory=lambda: array("f"))
    adapted: array[float] = field(default_factory=lambda: array("f"))
    articles: list[tuple[str, int]] = field(default_factory=list)
    """(title, number of its first token)"""

    def spans(self) -> list[tuple[str, int, int]]:
        """Return (title, number of the first token, tokens) of each text."""
        stops = [*(start for _, start in self.articles[1:]), len(self.texts)]
        return [(title, start, stop - start) for (title, start), stop in zip(self.articles, stops, strict=True)]


class Reading:
    """Texts as they were read: the losses of every token, in nats, and what is made of them.

    ``totals`` are the sums. ``words`` and ``record`` are None where nobody asked for them. ``len`` counts tokens,
    ``str`` tells the totals in four lines.
    """

    def __init__(
        self,
        session: Session,
        rule: Rule,
        read_from: str = "",
        *,
        method: str = "",
        tokens: bool = True,
        words: bool = True,
    ) -> None:
        self.session, self.rule, self.read_from, self.totals = session, rule, read_from, Totals()
        self.method = method or rule.name
        self.record = Record() if tokens else None
        self.words = Occurrences(WORDS) if words else None

    def __repr__(self) -> str:
        totals = self.totals
        return (
            f"Reading({totals.tokens:,} tokens, {totals.bits(totals.static):.3f} bits per byte static, "
            f"{totals.bits(totals.adapted):.3f} {self.method}, gain {self.gain:+.3f} nats per token)"
        )

    def __str__(self) -> str:
        return "\n".join(self.totals.told(self.method))

    def __len__(self) -> int:
        return self.totals.tokens

    @property
    def gain(self) -> float:
        """Nats per token that learning while reading took off the loss."""
        return self.totals.gain

    @property
    def nats(self) -> float:
        """The loss of all tokens with learning, in nats."""
        return self.totals.adapted

    @property
    def static_nats(self) -> float:
        """The loss of all tokens under the trained weights, in nats."""
        return self.totals.static

    @property
    def bits_per_byte(self) -> float:
        """Of the text's UTF-8 bytes, with learning."""
        return self.totals.bits(self.totals.adapted)

    @property
    def static_bits_per_byte(self) -> float:
        """Of the text's UTF-8 bytes, under the trained weights."""
        return self.totals.bits(self.totals.static)

    @property
    def tokens(self) -> list[Token]:
        """Every token in reading order.

        Raises:
            InputError: the tokens were not kept.
        """
        record = self._kept()
        return list(map(Token, record.texts, record.static, record.adapted))

    @property
    def note(self) -> str:
        """A warning where the figures mislead, or nothing."""
        return self.totals.note(self.session.home)

    def begin(self, title: str) -> None:
        """Begin a new text."""
        self.totals.begin()
        if self.words and self.session.config.reset == "article":
            self.words.end_text()
        if self.record:
            self.record.articles.append((printable(title), len(self.record.texts)))

    def add(self, texts: Sequence[str], static_S: Tensor, adapted_S: Tensor) -> None:
        """Add the tokens of a segment: their stretches of the text and their losses (S,) in nats."""
        self.totals.tokens += len(texts)
        self.totals.static += float(static_S.sum())
        self.totals.adapted += float(adapted_S.sum())
        static, adapted = static_S.tolist(), adapted_S.tolist()
        if self.words:
            self.words.add(texts, static, adapted)
        if self.record:
            self.record.texts += texts
            self.record.static.extend(static)
            self.record.adapted.extend(adapted)

    def end(self) -> None:
        """Nothing more will be read."""
        if self.words:
            self.words.end_text()

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page on which every token is coloured by its gain.

        Raises:
            InputError: the tokens or words were not kept, or nothing was read.
        """
        with optional("a page"):
            from dynlm.report.tokenmap import TokenMap, write_token_map  # matplotlib, which takes a second

        record, words = self._kept(), self.words
        if words is None or not record.texts:
            raise InputError("nothing was read, or its words were not kept: there is no page to write")
        shown = TokenMap(
            self.method,
            record.articles,
            record.texts,
            record.static,
            record.adapted,
            self.totals.figures(),
            self.provenance(),
            words=words.rows(),
            mean=words.mean(),
            limit=words.limit,
            note=self.note,
        )
        write_token_map(Path(path), shown)

    def to_dict(self) -> Json:
        """Return all figures as JSON holds them: totals, provenance, articles, words that came again, every token.

        Raises:
            InputError: the tokens or words were not kept.
        """
        record, words = self._kept(), self.words
        if words is None:
            raise InputError("the words were not kept: read with words=True")
        return {
            "rule": self.method,
            "provenance": self.provenance(),
            "totals": self.totals.figures(),
            "note": self.note or None,
            "words": words.rows(),
            "words_mean": words.mean(),
            "words_limit": words.limit or None,
            "articles": [
                {"title": title, "first_token": start, "tokens": tokens} for title, start, tokens in record.spans()
            ],
            "tokens": {
                "text": record.texts,
                "static": [round(nats, 6) for nats in record.static],
                "adapted": [round(nats, 6) for nats in record.adapted],
            },
        }

    def to_pandas(self) -> pandas.DataFrame:
        """Return a row for every token: article, text, static and adapted loss and gain in nats.

        Raises:
            InputError: the tokens were not kept, or pandas is not installed.
        """
        record = self._kept()
        titles = [title for title, _, tokens in record.spans() for _ in range(tokens)]
        columns = {"article": titles, "token": record.texts, "static": record.static, "adapted": record.adapted}
        rows = frame(columns)
        rows["gain"] = rows["static"] - rows["adapted"]
        return rows

    def _kept(self) -> Record:
        if self.record is None:
            raise InputError("the tokens were not kept: read with tokens=True")
        return self.record

    def provenance(self) -> Json:
        """Return what the figures were made with: model, weights, fingerprints, versions, settings of the rule."""
        session, rule = self.session, self.rule
        told: Json = {
            "model": session.source,
            "adapted weights": sum(p.theta0.numel() for p in session.priors),
            **{f"fingerprint of the {name}": value for name, value in session.fingerprints(rule).items()},
            "tokens between updates": session.config.segment,
            "weights reset": "never" if session.config.reset == "never" else "at each article",
            "read on from": self.read_from or "the trained weights",
            "dynlm": dynlm.__version__,
            "torch": torch.__version__,
        }
        return told | {f"rule: {name}": value for name, value in rule.settings().items()}


def frame(columns: Mapping[str, Any], index: Sequence[str] | None = None) -> pandas.DataFrame:
    """Return columns of equal length as a table.

    Raises:
        InputError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise InputError("pandas is not installed: install it, or use the figures as dict and JSON") from None
    return pandas.DataFrame(columns, index=index)
