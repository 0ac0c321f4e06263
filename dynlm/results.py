"""The one definition of results.json: what ``evaluate`` writes, and the report and later commands read.

losses.safetensors, beside it, holds every token and its loss under every method (dynlm.evaluation.compare).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from dynlm.files import read_json, write_json
from dynlm.methods import STATIC
from dynlm.settings import Bound, Count, NotEmpty, Whole, check
from dynlm.types import InputError

SCHEMA = 2
AGAIN = "run `dynlm evaluate` again"
Interval = list[float | None] | None
"""the ends of a 95 % interval; None where there is no spread to tell one from"""


class Data(TypedDict):
    """What was read."""

    source: str
    split: str
    titles: Annotated[list[str], NotEmpty()]
    fingerprint: str


Model = TypedDict(
    "Model",
    {"class": str, "parameters": Annotated[int, Bound(0)], "adapted": Annotated[int, Bound(0)], "fingerprint": str},
)
"""what it was read with"""
Stretch = TypedDict(
    "Stretch",
    {"from": Whole, "to": Whole, "tokens": Whole, "articles": Whole, "gain": float | None, "ci95": Interval},
)
"""the gain between two positions in the articles"""


class Perplexities(TypedDict):
    """A loss in nats, in three units; None: beyond all numbers, or of text that the tokens do not spell."""

    nats: float
    token_ppl: float | None
    word_ppl: float | None
    bits_per_byte: float | None


class Description(TypedDict):
    """What a method is."""

    rule: str
    """the rule's own name, or ``stateless``"""
    kind: Literal["baseline", "hand-made", "learned"]
    """of the rule; a cache beside a baseline is hand-made"""
    seed: Whole
    start: str | None
    """the method of ``learn-start`` that learned its θ0"""
    cache: bool
    mix: NotRequired[bool]
    """whether a learned network weighs static, adapted and cache predictions; absent in files of earlier versions"""
    settings: dict[str, float | int | str]
    fingerprint: str | None
    """of the rule; None for one that changes nothing"""


class MethodResult(Description, Perplexities):
    """How one method did."""

    gain_nats_per_token: float
    gain_ci95: Interval
    tokens_per_s: float | None
    gain_by_position: list[Stretch]


class Comparison(TypedDict):
    """Two methods, paired over articles."""

    better: str
    worse: str
    gain_nats_per_token: float
    ci95: Interval
    word_ppl_ratio: NotRequired[float]
    p: NotRequired[float]
    p_holm: NotRequired[float | None]


class Gain(TypedDict):
    """A mean over the tokens of a class, or over articles."""

    mean: float
    ci95: Interval


class ClassOfTokens(TypedDict):
    """The loss of static reading in a class of tokens and the gain of every other method, in nats per token."""

    tokens: Whole
    articles: Whole
    static: float
    gain: dict[str, Gain]


class Row(ClassOfTokens):
    """A class with its name."""

    bin: str


class Switch(ClassOfTokens):
    """The tokens of a segment after a switch of articles."""

    segment: Whole


class Boundaries(TypedDict):
    """Losses after switches from the second article on, and segments until the mean loss since is near the article's.

    Near is within 2 %. static, which remembers nothing but its hidden state, tells what is due to the text.
    """

    segments: list[Switch]
    recovery_segments: dict[str, Gain]


Bin = TypedDict("Bin", {"from": float, "to": float, "tokens": Whole, "confidence": float, "accuracy": float})
"""tokens by the probability of the most probable token"""


class Calibration(TypedDict):
    """How far confidence is from accuracy."""

    ece: float
    ci95: Interval
    bins: list[Bin]


class GateSizes(TypedDict):
    """What the gates of one method were recorded of; single updates are "gates/METHOD" in losses.safetensors."""

    tensors: list[str]
    weights: list[Whole]
    segments: list[Whole]
    """updates of each of the articles recorded"""
    mean: dict[str, list[float]]
    """copy, update and flush: means over these updates, one a tensor"""


class Again(TypedDict):
    """How the weights that a method leaves at the end of the stream read the first article, without learning.

    Nats per token; ``gain`` is that over θ0, its interval over segments, as there is one article.
    """

    first_reading: float
    again: float
    gain: float
    ci95: Interval


class Interference(TypedDict):
    """What the end of a stream has done to its beginning; ``static``: nats per token of the first article with θ0."""

    article: str
    segments: Whole
    static: float
    methods: dict[str, Again]


ClassName = Literal["relative_position", "occurrence", "train_frequency", "vocabulary"]


class Breakdowns(TypedDict, total=False):
    """Where reading gains: bins without tokens are left out, and tokens of no word are in ``relative_position`` alone.

    Intervals are 95 % percentile bootstrap over articles. A gain is of that share of the tokens: gains of bins,
    weighted with their tokens, sum to the gain of all.
    """

    relative_position: list[Row]
    """tenths of the article"""
    occurrence: list[Row]
    """first and later occurrence of a word in its article, all tokens of the word"""
    train_frequency: list[Row]
    """words by how often the training text holds them: 0, then powers of ten"""
    vocabulary: list[Row]
    """names, numbers, function words, punctuation, others (dynlm.evaluation.words)"""
    calibration: dict[str, Calibration]
    gates: dict[str, GateSizes]
    boundaries: Boundaries
    """read.reset never only, as is ``interference``"""
    interference: Interference


class Spread(TypedDict):
    """Over seeds."""

    mean: float
    sd: float


class Seeds(TypedDict):
    """Methods that differ by their seed alone."""

    methods: list[str]
    word_ppl: Spread
    gain_nats_per_token: Spread


class Summary(TypedDict):
    """The figures of all methods together."""

    methods: dict[str, MethodResult]
    seeds: dict[str, Seeds]
    comparisons: list[Comparison]


class Circumstances(TypedDict):
    """What was read with, and how much."""

    reset: str
    segment: Count
    model: Model
    tokenizer: NotRequired[dict[str, str | int]]
    versions: dict[str, str]
    articles: Count
    tokens: Count
    words: Count
    bytes: Count


class Results(Circumstances):
    """All of it."""

    data: Data
    methods: dict[str, MethodResult]
    seeds: NotRequired[dict[str, Seeds]]
    comparisons: NotRequired[list[Comparison]]
    breakdowns: NotRequired[Breakdowns]
    diverged: NotRequired[dict[str, str]]
    """methods that have no figures, and why"""
    asked: NotRequired[dict[str, Any]]
    """all that the evaluation depends on: ``--resume`` keeps one that depends on the same"""


def save_results(results: Results, path: Path) -> None:
    """Write results.json, with its schema."""
    write_json(path, {"schema": SCHEMA, **results})


def load_results(path: Path) -> Results:
    """Return the counterpart of :func:`save_results`.

    Raises:
        InputError: no file, one of another schema, one that lacks something or holds what it must not.
    """
    values = read_json(path)
    if values.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {values.get('schema')!r}, this version reads {SCHEMA}: {AGAIN}")
    try:
        results = cast(Results, check(Results, values, str(path)))
    except InputError as error:
        raise InputError(f"{error}: {AGAIN}") from None
    compared = [name for row in results.get("comparisons", []) for name in (row["better"], row["worse"])]
    if missing := [name for name in (STATIC, *compared) if name not in results["methods"]]:
        raise InputError(f"{path}: methods lack {missing[0]!r}: {AGAIN}")
    return results
