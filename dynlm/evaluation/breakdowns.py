"""Where reading gains: the paired gain over static, broken down (dynlm.results.Breakdowns says into what)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynlm.data.tokenizers import Tokenizer
from dynlm.evaluation.stream import Scores
from dynlm.evaluation.words import KINDS, Words, find_words, kind
from dynlm.paired import bootstrap_ratio
from dynlm.results import Again, Boundaries, Breakdowns, ClassName, ClassOfTokens, Gain, Interference, Row
from dynlm.types import TokenizedArticle

TENTHS = 10
FREQUENCIES = ("0", "1-9", "10-99", "100-999", "1,000-9,999", "10,000-99,999", "100,000 and more")
OCCURRENCES = ("first", "later")
FIRST_SEGMENTS = 8
TOLERANCE = 1.02


class ArticlesRead(NamedTuple):
    """What the breakdowns know of the text beside the losses."""

    articles: Sequence[TokenizedArticle]
    tokenizer: Tokenizer
    train_counts: Counter[str]
    """occurrences of each word in the training text; empty where that is not known"""
    segment: int
    reset: str


def break_down(scores: Mapping[str, Scores], reading: ArticlesRead) -> Breakdowns:
    """Return all breakdowns; ``scores`` must hold ``static``."""
    texts = [find_words(reading.tokenizer, article.ids_T) for article in reading.articles]
    result = Breakdowns()
    classes: dict[ClassName, tuple[list[Tensor], Sequence[str]]] = {
        "relative_position": (
            [torch.arange(len(a)) * TENTHS // len(a) for a in reading.articles],
            [f"{10 * k}-{10 * k + 10} %" for k in range(TENTHS)],
        ),
        "occurrence": ([_spread(text, _occurrences(text)) for text in texts], OCCURRENCES),
        "train_frequency": (
            [_spread(text, [_frequency(reading.train_counts[w]) for w in text.words]) for text in texts],
            FREQUENCIES,
        ),
        "vocabulary": ([_spread(text, _kinds(text)) for text in texts], KINDS),
    }
    if not reading.train_counts:
        del classes["train_frequency"]
    for title, (class_T, labels) in classes.items():
        result[title] = gains(scores, class_T, labels)
    result["calibration"] = {name: s.calibration for name, s in scores.items() if s.calibration is not None}
    result["gates"] = {name: s.gates.summary() for name, s in scores.items() if s.gates is not None}
    if reading.reset == "never":
        result["boundaries"] = _boundaries(scores, reading.segment)
        result["interference"] = _interference(scores, reading)
    return result


def gains(scores: Mapping[str, Scores], classes: Sequence[Tensor], labels: Sequence[str]) -> list[Row]:
    """Rows of the paired gain by class; ``classes`` holds one (T,) tensor an article, −1 for tokens left out."""
    return [{"bin": labels[c], **found} for c, found in _by_class(scores, classes, len(labels)).items()]


def _by_class(scores: Mapping[str, Scores], classes: Sequence[Tensor], n: int) -> dict[int, ClassOfTokens]:
    """Return the figures of each of ``n`` classes that has tokens."""
    sizes_AC = _sums([torch.ones(c.shape, dtype=torch.float64) for c in classes], classes, n)
    sums = {name: _sums(score.losses, classes, n) for name, score in scores.items()}
    found: dict[int, ClassOfTokens] = {}
    for c in range(n):
        there = sizes_AC[:, c] > 0
        if not there.any():
            continue
        sizes, static = sizes_AC[there, c], sums["static"][there, c]
        gain = {name: _ratio(static - sums[name][there, c], sizes) for name in scores if name != "static"}
        total = float(sizes.sum())
        articles, loss = int(there.sum()), float(static.sum()) / total
        found[c] = {"tokens": int(total), "articles": articles, "static": loss, "gain": gain}
    return found


def _sums(values: Sequence[Tensor], classes: Sequence[Tensor], n: int) -> Tensor:
    """Return (articles, n) sums of per-token values by class."""
    sums_AC = torch.zeros(len(values), n + 1, dtype=torch.float64)
    for sums_C, value_T, class_T in zip(sums_AC, values, classes, strict=True):
        sums_C.index_add_(0, torch.where(class_T < 0, n, class_T), value_T.double())
    return sums_AC[:, :n]


def _ratio(sums: Tensor, sizes: Tensor) -> Gain:
    return {"mean": float(sums.sum() / sizes.sum()), "ci95": list(bootstrap_ratio(sums, sizes))}


def _spread(text: Words, of_word: Sequence[int]) -> Tensor:
    """From words to their tokens; −1 for tokens of no word."""
    return torch.tensor([of_word[word] if word >= 0 else -1 for word in text.word_T])


def _occurrences(text: Words) -> list[int]:
    seen: set[str] = set()
    later = []
    for word in text.words:
        later.append(int(word in seen))
        seen.add(word)
    return later


def _frequency(count: int) -> int:
    return 0 if count == 0 else min(len(str(count)), len(FREQUENCIES) - 1)


def _kinds(text: Words) -> list[int]:
    return [KINDS.index(kind(word, first)) for word, first in zip(text.words, text.first, strict=True)]


def _boundaries(scores: Mapping[str, Scores], segment: int) -> Boundaries:
    """Losses after a switch from one article to the next, and how fast they come down."""
    after = {name: score._replace(losses=score.losses[1:]) for name, score in scores.items()}
    if not after["static"].losses:
        return {"segments": [], "recovery_segments": {}}
    number_T = [torch.arange(losses_T.numel()) // segment for losses_T in after["static"].losses]
    classes = [torch.where(n_T < FIRST_SEGMENTS, n_T, -1) for n_T in number_T]
    found = _by_class(after, classes, FIRST_SEGMENTS)
    times = {name: torch.tensor([recovery(x, segment) for x in score.losses]) for name, score in after.items()}
    return {
        "segments": [{"segment": k + 1, **figures} for k, figures in found.items()],
        "recovery_segments": {name: _ratio(t.double(), torch.ones(t.shape)) for name, t in times.items()},
    }


def recovery(losses_T: Tensor, segment: int) -> int:
    """Segments until the mean loss from the article's start is at most 2 % above that of the whole article."""
    mean_T = losses_T.double().cumsum(0) / torch.arange(1, losses_T.numel() + 1)
    ends = [min(end, losses_T.numel()) for end in range(segment, losses_T.numel() + segment, segment)]
    within = (mean_T[torch.tensor(ends) - 1] <= TOLERANCE * mean_T[-1]).nonzero()
    return int(within[0]) + 1  # the whole article is within


def _interference(scores: Mapping[str, Scores], reading: ArticlesRead) -> Interference:
    """Return what the end of the stream has done to its beginning."""
    static_T, segment = scores["static"].losses[0].double(), reading.segment
    methods: dict[str, Again] = {}
    for name, score in scores.items():
        if name == "static" or score.again is None:
            continue
        gain_T = static_T - score.again.double()
        sizes = torch.tensor([part.numel() for part in gain_T.split(segment)])
        interval = bootstrap_ratio(torch.stack([part.sum() for part in gain_T.split(segment)]), sizes)
        methods[name] = {
            "first_reading": float(score.losses[0].double().mean()),
            "again": float(score.again.double().mean()),
            "gain": float(gain_T.mean()),
            "ci95": list(interval),
        }
    return {
        "article": reading.articles[0].title,
        "segments": -(-static_T.numel() // segment),
        "static": float(static_T.mean()),
        "methods": methods,
    }
