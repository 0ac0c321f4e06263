"""Ordinary text in the spacing of WikiText, for models that were trained on it, and back to the text as it was.

WikiText sets words and marks apart by one blank: ``word , word .``, ``2 @,@ 000``, ``0 @.@ 5``, ``well @-@ known``,
``it 's``, ``don 't``, ``( 1990 )``; lines begin and end with one. What is in this spacing already stays as it is.
Each rule looks at one word alone (what stands between blanks), so the border of a chunk changes nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal

Spacing = Literal["none", "wikitext"]

TYPOGRAPHIC = str.maketrans("“”„«»‘’", '"""""\'\'')  # a character for a character, so that places stay
PARTS = re.compile(r"\n|[^\S\n]+|\S+")
WHOLE = re.compile(r"<unk>|<formula>|@[-,.]@|\.{2,}|-{2,}|'[^\W\d_]*|[^\W_]+")  # words that are as they should be
PAIRED = re.compile(r"(?<![^\W_])'(?=[^']*\S'(?![^\W_]))")
MARK = re.compile(r"<unk>|<formula>|-{2,}|\.{2,}|[^\w\s.,'@-]|_")
IN_NUMBER = re.compile(r"(?<=\d)([,.])(?=\d)")
HYPHEN = re.compile(r"(?<=[^\W_])-(?=[^\W_])")
EDGE_HYPHEN = re.compile(r"(?<!\S)-(?=\S)")
APOSTROPHE = re.compile(r"(?<=[^\W_])'(?=[^\W_])")
LAST_APOSTROPHE = re.compile(r"(?<=\S)'(?!\S)")
LAST_STOP = re.compile(r"(?<=[^\s.])\.(?!\S)")
ABBREVIATED = """
Adm al Bros Brig Capt Co Col Corp Dr Esq Fr Ft Gen Gov Hon Inc Jr lit Lt Ltd Maj Messrs Mr Mrs Ms Mt No Nos Nr Op Prof
Rep Rev Sen Sgt Sr St Ste Vol approx c ca cf ed eds etc fl p pp r sp ssp v var vol vs
"""
ABBREVIATIONS = frozenset(ABBREVIATED.split())
ATTACHED, APART = re.compile(r"[^\W_][,;:)]|[^\W_]\.(?=\n)|\([^\W_]"), re.compile(r" [.,;:)](?=\s)|\( ")
LOOKED_AT = 2000  # characters of a line that are looked at
ENOUGH = 4  # marks that tell whether a text is in this spacing


@lru_cache(1 << 16)
def spaced_word(word: str) -> str:
    """One word, without blanks around, in WikiText's spacing: ``word`` with blanks and ``@`` inserted.

    Its typographic quotes must be plain ones already.
    """
    if WHOLE.fullmatch(word):
        return word
    word = PAIRED.sub("' ", word)
    word = MARK.sub(_apart, word)
    word = IN_NUMBER.sub(r" @\1@ ", word)
    word = HYPHEN.sub(" @-@ ", word)
    parts = (part if WHOLE.fullmatch(part) else _edges(part) for part in word.split())
    return " ".join(" ".join(parts).split())


def _apart(match: re.Match[str]) -> str:
    combines = unicodedata.category(match[0][0]).startswith("M")  # belongs to the letter before it
    return match[0] if combines else f" {match[0]} "


def _edges(part: str) -> str:
    part = part.replace(",", " , ")
    part = " ".join(p if _is_abbreviation(p) else LAST_STOP.sub(" .", p) for p in part.split())
    part = EDGE_HYPHEN.sub("- ", part)
    return LAST_APOSTROPHE.sub(" '", APOSTROPHE.sub(" '", part))


def _is_abbreviation(word: str) -> bool:
    """``U.S.``, ``e.g.``, ``A.`` and ``Dr.`` keep their full stop."""
    stem = word.removesuffix(".")
    if stem == word:
        return False
    initials = len(stem) == 1 and stem.isupper()
    return initials or stem in ABBREVIATIONS or ("." in stem and any(map(str.isalpha, stem)))


class Spaced:
    """One stretch of a text in WikiText's spacing, and where each of its characters comes from."""

    def __init__(self, source: str, text: str, ends: Sequence[int]) -> None:
        self.source, self.text, self.ends = source, text, ends

    def originals(self, stretches: Sequence[str]) -> list[str]:
        """Stretches that joined are :attr:`text`, as stretches that joined are :attr:`source`; some may be empty."""
        found, here, at = [], 0, 0
        for stretch in stretches:
            at += len(stretch)
            end = self.ends[at]
            found.append(self.source[here:end])
            here = end
        if found:
            found[-1] += self.source[here:]
        return found


class Spacer:
    """Puts the chunks of one text into WikiText's spacing, one after the other.

    ``auto`` leaves a text as it is that is spaced so already: whether it is, the first few marks that tell decide, and
    before these the majority of those so far.
    """

    def __init__(self, auto: bool = False) -> None:
        self.auto, self.needed = auto, True
        self.marks = [0, 0]  # attached, apart
        self.begins, self.after_blank = True, False

    def __call__(self, chunk: str) -> Spaced:
        text, ends, at = list[str](), [0], 0
        for line in chunk.split("\n"):
            line = chunk[at : at + len(line) + 1]  # with its end
            self._look_at(line)
            for piece, froms in self._pieces(line) if self.needed else self._as_it_is(line):
                text.append(piece)
                ends += (at + end for end in froms)
            at += len(line)
        return Spaced(chunk, "".join(text), ends)

    def _look_at(self, line: str) -> None:
        """Count marks from the start of a line, so that chunks change nothing, until there are enough."""
        if self.auto and self.begins and sum(self.marks) < ENOUGH:
            for i, pattern in enumerate((ATTACHED, APART)):
                self.marks[i] += len(pattern.findall(line[:LOOKED_AT]))
            self.needed = self.marks[0] >= self.marks[1]

    def _as_it_is(self, line: str) -> Iterator[tuple[str, Iterable[int]]]:
        yield line, range(1, len(line) + 1)
        if line:
            self.begins, self.after_blank = line.endswith("\n"), line[-1:].isspace()

    def _pieces(self, line: str) -> Iterator[tuple[str, Iterable[int]]]:
        """Yield (spaced piece, for each of its characters the place in ``line`` where what it stands for ends)."""
        for match in PARTS.finditer(line):
            piece, start, end = match[0], match.start(), match.end()
            if piece == "\n":
                yield ("\n", (end,)) if self.after_blank else (" \n", (start, end))
            elif piece.isspace():
                if not self.after_blank:
                    yield " ", (end,)
            else:
                if self.begins:
                    yield " ", (start,)
                plain = piece.translate(TYPOGRAPHIC) if len(piece) > 1 else piece
                spaced = spaced_word(plain)
                yield spaced, _ends(start, plain, spaced)
            self.begins, self.after_blank = piece == "\n", piece != "\n" and piece.isspace()


def spaced_whole(text: str) -> str:
    """Return a whole text in WikiText's spacing, or as it is where it has that already."""
    return Spacer(auto=True)(text).text


def _ends(at: int, plain: str, spaced: str) -> Iterator[int]:
    """Where the prefix of ``plain`` ends that each prefix of ``spaced`` stands for, ``plain`` beginning at ``at``."""
    stop = at + len(plain)
    for character in spaced:
        at += at < stop and character == plain[at - stop]
        yield at
