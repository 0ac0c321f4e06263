"""Words of a text from its tokens, and what they lost at their first, second and third occurrence.

A word is a run of letters, digits and underscores, with apostrophes inside but without a possessive ``'s``; any other
token that is not blank is a mark. A token belongs to the word of its first character that is part of one, so a word's
loss is the sum over its tokens: minus the logarithm of the probability of the whole word.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from dynlm.files import Json

OCCURRENCES = 3
"""occurrences of a word whose losses are kept"""
DISTINCT = 20_000
"""words of one text whose occurrences are followed, so that an endless stream takes a few megabytes"""
LONGEST = 40
"""characters of a word"""
SHORTEST = 3
EXTREMES = 10
"""words in each of the two lists of :func:`extremes`"""
SURPRISING = 5.0
"""nats that static must lose at the first occurrence, about one in 150, for a word to be listed"""
APOSTROPHES = "'’"


class Word(NamedTuple):
    """One occurrence of a word or of a mark, with its losses in nats."""

    text: str
    static: float
    adapted: float
    mark: bool = False


class Splitter:
    """Takes the tokens of a text one by one and gives each word when it has ended."""

    def __init__(self) -> None:
        self._text = ""
        self._parts: list[tuple[int, float, float]] = []  # (place of the token's first character, losses)
        self._held: list[tuple[int, float, float]] = []  # tokens without characters: the word may go on after them

    def add(self, text: str, static: float, adapted: float) -> Iterator[Word]:
        """Yield the words that this token ends."""
        if not text and 0 < len(self._text) <= LONGEST:
            self._held.append((len(self._text), static, adapted))
        taken = False
        for run in _runs(text, bool(self._text)):
            if not run:
                yield from self.end()
                continue
            if len(self._text) <= LONGEST:
                if not taken:
                    self._parts += [*self._held, (len(self._text), static, adapted)]
                self._text += run[: LONGEST + 1]
            taken = True
            self._held.clear()
        if not taken and (mark := text.strip()):
            yield Word(mark, static, adapted, mark=True)

    def end(self) -> Iterator[Word]:
        """Yield the word that is open, where the text ends."""
        text, parts = self._text, self._parts
        self._text, self._parts = "", []
        self._held.clear()
        if not parts or parts[0][0] or len(text) > LONGEST:  # its first token belongs to the word before it
            return
        word = text.rstrip(APOSTROPHES)
        if word[-1] == "s" and word[-2:-1] in APOSTROPHES:
            word = word[:-2].rstrip(APOSTROPHES) or word
        kept = [part for part in parts if part[0] < len(word)]
        yield Word(word, sum(static for _, static, _ in kept), sum(adapted for *_, adapted in kept))


@lru_cache(1 << 14)  # tokens come again and again
def _runs(text: str, inside: bool) -> tuple[str, ...]:
    """The runs of a token's text that are part of words, and ``""`` for each that is not. ``inside``: it begins while
    a word is open, which marks on letters and apostrophes go on with."""
    runs: list[str] = []
    for character in text:
        word = character.isalnum() or character == "_"
        word = word or (inside and (character in APOSTROPHES or unicodedata.category(character)[0] == "M"))
        if not word:
            runs += [""] * (not runs or runs[-1] != "")
        elif inside and runs:
            runs[-1] += character
        else:
            runs.append(character)
        inside = word
    return tuple(runs)


def words_of(tokens: Iterable[tuple[str, float, float]]) -> Iterator[Word]:
    """Yield all words and marks of a whole text, in order, from its tokens: (text, static and adapted nats)."""
    splitter = Splitter()
    for token in tokens:
        yield from splitter.add(*token)
    yield from splitter.end()


@dataclass(slots=True)
class Followed:
    """A word of one text: how often it came, and its losses at the first occurrences."""

    word: str
    times: int = 0
    static: list[float] = field(default_factory=list)
    adapted: list[float] = field(default_factory=list)

    def add(self, word: Word) -> None:
        self.times += 1
        if self.times <= OCCURRENCES:
            self.static.append(word.static)
            self.adapted.append(word.adapted)

    @property
    def listed(self) -> bool:
        """Whether it came again and static did not expect it. The gain plays no part in this choice."""
        return self.times > 1 and self.static[0] >= SURPRISING

    @property
    def rank(self) -> tuple[int, float]:
        """Higher is listed first: words with all occurrences, then those that static expected least."""
        return len(self.static), self.static[0]

    def json(self) -> Json:
        """``word``, ``times``, and ``static`` and ``adapted`` nats at up to three occurrences."""
        return {"word": self.word, "times": self.times, "static": self.static, "adapted": self.adapted}


class Occurrences:
    """The words that static expected least and that came again, with their losses, first occurrence first.

    Chosen by static's loss at the first occurrence alone. Texts that begin anew have their words anew. Memory is
    bounded: ``DISTINCT`` words of a text are followed, and ``keep`` rows of the texts before it.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.full = False
        """whether words were left out because there were too many"""
        self._rows: list[Followed] = []
        self._sums = [(0.0, 0.0)] * OCCURRENCES
        self._complete = 0
        self._begin()

    def _begin(self) -> None:
        self._splitter = Splitter()
        self._words: dict[str, Followed] = {}

    def add(self, texts: Iterable[str], static_T: Iterable[float], adapted_T: Iterable[float]) -> None:
        """Tokens of the present text, as they come."""
        for text, static, adapted in zip(texts, static_T, adapted_T, strict=True):
            self._follow(self._splitter.add(text, static, adapted))

    def _follow(self, words: Iterable[Word]) -> None:
        for word in words:
            if word.mark or len(word.text) < SHORTEST or not any(map(str.isalpha, word.text)):
                continue
            followed = self._words.get(word.text)
            if followed is None:
                if len(self._words) >= DISTINCT:
                    self.full = True
                    continue
                followed = self._words[word.text] = Followed(word.text)
            followed.add(word)

    def end_text(self) -> None:
        """The present text is over: what comes next are first occurrences again."""
        self._follow(self._splitter.end())
        listed = [followed for followed in self._words.values() if followed.listed]
        for followed in listed:
            if len(followed.static) == OCCURRENCES:
                self._complete += 1
                losses = zip(self._sums, followed.static, followed.adapted, strict=True)
                self._sums = [(a + static, b + adapted) for (a, b), static, adapted in losses]
        best: dict[str, Followed] = {}
        for followed in sorted([*self._rows, *listed], key=lambda f: f.rank, reverse=True):
            best.setdefault(followed.word, followed)  # a word of several texts: the one that ranks first
        self._rows = list(best.values())[: self.keep]
        self._begin()

    @property
    def limit(self) -> str:
        """What a reader of the rows must know where not all words were followed; empty where they were."""
        return f"only the first {DISTINCT:,} different words of a text were followed" if self.full else ""

    def rows(self) -> list[Json]:
        """Return the words of all texts that have ended, see :meth:`Followed.json`."""
        return [followed.json() for followed in self._rows]

    def mean(self) -> Json | None:
        """Means over all words that could be listed and came three times: ``words`` (their number), ``static`` and
        ``adapted``; None without any."""
        if not self._complete:
            return None
        static, adapted = zip(*self._sums, strict=True)
        means = {"static": static, "adapted": adapted}
        return {"words": self._complete} | {k: [v / self._complete for v in sums] for k, sums in means.items()}


def extremes(tokens: Iterable[tuple[str, float, float]], keep: int = EXTREMES) -> Json:
    """Return the words and marks that gained and lost most in all: (text, times, nats)."""
    sums: dict[str, tuple[int, float]] = {}
    for word in words_of(tokens):
        times, gain = sums.get(word.text, (0, 0.0))
        sums[word.text] = times + 1, gain + word.static - word.adapted
    rows = [(text, *of_text) for text, of_text in sorted(sums.items(), key=lambda item: -item[1][1])]
    return {
        "gained": [row for row in rows[:keep] if row[2] > 0],
        "lost": [row for row in rows[: -keep - 1 : -1] if row[2] < 0],
    }
