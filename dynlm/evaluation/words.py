"""Words of an article and what kind they are, from its tokens.

A word is a maximal run of non-space characters. A token belongs to the word of its first character that is no space;
tokens of spaces and ends of line belong to none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dynlm.data.tokenizers import HuggingFaceTokenizer, Tokenizer

KINDS = ("names", "numbers", "function words", "punctuation", "others")
_FUNCTION_WORDS = """
    a about above after again against all although am among an and any are as at be because been before being below
    between both but by can could did do does doing down during each either few for from further had has have having he
    her here hers him himself his how i if in into is it its itself may me might more most must my neither no nor not of
    off on once only onto or other our ours out over own same shall she should since so some such than that the their
    theirs them themselves then there these they this those though through to too under until up upon us very was we
    were what when where whether which while who whom whose why will with within without would yet you your
    's 't
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
ENDS = (".", "!", "?")  # of a sentence
UNKNOWN = "<unk>"


class Words(NamedTuple):
    """``word_T``: index of each token's word, −1 for none. ``first``: whether the word opens a sentence."""

    word_T: list[int]
    words: list[str]
    first: list[bool]


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token, its leading space included."""
    distinct = list(dict.fromkeys(ids))
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return _look_up(dict(zip(distinct, tokenizer.pieces(distinct), strict=True)), ids)
    # decoders drop the space before a text's first token: decode each behind another one
    anchor = tokenizer.encode("a")[-1:]
    prefix = tokenizer.decode(anchor)
    return _look_up({i: tokenizer.decode([*anchor, i]).removeprefix(prefix) for i in distinct}, ids)


def _look_up(texts: dict[int, str], ids: Sequence[int]) -> list[str]:
    return [texts[i] for i in ids]


def find_words(tokenizer: Tokenizer, ids_T: Tensor) -> Words:
    """Return the words of an article."""
    ids = ids_T.tolist()
    word_T: list[int] = []
    words: list[str] = []
    first: list[bool] = []
    inside, opens = False, True
    for text in token_texts(tokenizer, ids):
        mine = -1
        for run in re.findall(r"\s+|\S+", text):
            if run.isspace():
                if inside:
                    opens, inside = _next_opens(words[-1], first[-1]), False
                opens = opens or "\n" in run
                continue
            if inside:
                words[-1] += run
            else:
                words.append(run)
                first.append(opens)
                inside = True
            mine = len(words) - 1 if mine < 0 else mine
        word_T.append(mine)
    return Words(word_T, words, first)


def _next_opens(word: str, opened: bool) -> bool:
    """Whether the word after ``word`` opens a sentence: after its end, and after quotes and marks that open one."""
    return word.rstrip("\"'”’)").endswith(ENDS) or (opened and not any(map(str.isalnum, word)))


def kind(word: str, first: bool) -> str:
    """One of ``KINDS``. A name is capitalised inside a sentence; at a sentence's start nobody can tell."""
    if word == UNKNOWN:
        return "others"
    core = word.strip("\"'“”‘’()[]{}.,;:!?…–—") or word
    if any(map(str.isdigit, core)):
        return "numbers"
    if not any(map(str.isalpha, core)):
        return "punctuation"
    if core.lower() in FUNCTION_WORDS or word.lower() in FUNCTION_WORDS:
        return "function words"
    return "names" if core[0].isupper() and not first else "others"
