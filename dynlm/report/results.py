"""The types of results.json, as far as the report reads it; it holds more."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from dynlm.settings import Bound, Count, NotEmpty, Whole

Interval = list[float | None] | None


class Data(TypedDict):
    """What was read."""

    source: str
    split: str
    titles: Annotated[list[str], NotEmpty()]
    fingerprint: str


class Model(TypedDict):
    """What it was read with."""

    parameters: Annotated[int, Bound(0)]
    adapted: Annotated[int, Bound(0)]


Stretch = TypedDict(
    "Stretch",
    {"from": Whole, "to": Whole, "tokens": Whole, "articles": Whole, "gain": float | None, "ci95": Interval},
)
"""gains between two positions in the articles"""


class Method(TypedDict):
    """How one method did."""

    kind: Literal["baseline", "hand-made", "learned"]
    cache: bool
    nats: float
    token_ppl: float | None
    word_ppl: float | None
    bits_per_byte: float | None
    gain_nats_per_token: float
    gain_ci95: Interval
    tokens_per_s: float | None
    settings: NotRequired[dict[str, float | str]]
    fingerprint: NotRequired[str | None]
    gain_by_position: NotRequired[list[Stretch]]


class Comparison(TypedDict):
    """Two methods, paired over articles."""

    better: str
    worse: str
    gain_nats_per_token: float
    ci95: Interval
    p_holm: NotRequired[float | None]


class Gain(TypedDict):
    """A mean over the tokens of a class."""

    mean: float
    ci95: Interval


class Row(TypedDict):
    """A class of tokens."""

    bin: str
    tokens: Whole
    gain: dict[str, Gain]


class Switch(TypedDict):
    """A segment after a switch of articles."""

    segment: Whole
    static: float
    gain: dict[str, Gain]


class Boundaries(TypedDict):
    """Losses after switches."""

    segments: list[Switch]
    recovery_segments: dict[str, Gain]


class Bin(TypedDict):
    """Tokens by the confidence of the model."""

    confidence: float
    accuracy: float


class Calibration(TypedDict):
    """How far confidence is from accuracy."""

    ece: float
    ci95: Interval
    bins: list[Bin]


class GateSizes(TypedDict):
    """What the gates of one method were recorded of."""

    tensors: list[str]
    weights: list[Whole]
    segments: list[Whole]


class Again(TypedDict):
    """How a method reads the first article at the end of the stream."""

    first_reading: float
    again: float
    gain: float
    ci95: Interval


class Interference(TypedDict):
    """What the end of a stream has done to its beginning."""

    article: str
    static: float
    methods: dict[str, Again]


class Breakdowns(TypedDict, total=False):
    """dynlm.evaluation.breakdowns."""

    relative_position: list[Row]
    occurrence: list[Row]
    train_frequency: list[Row]
    vocabulary: list[Row]
    boundaries: Boundaries
    interference: Interference
    calibration: dict[str, Calibration]
    gates: dict[str, GateSizes]


class Spread(TypedDict):
    """Over seeds."""

    mean: float
    sd: float


class Seeds(TypedDict):
    """Methods that differ by their seed alone."""

    methods: list[str]
    word_ppl: Spread
    gain_nats_per_token: Spread


class Results(TypedDict):
    """All of it."""

    data: Data
    reset: str
    segment: Count
    model: Model
    versions: dict[str, str]
    articles: Count
    tokens: Count
    words: Count
    bytes: Count
    methods: dict[str, Method]
    tokenizer: NotRequired[dict[str, str | int]]
    seeds: NotRequired[dict[str, Seeds]]
    comparisons: NotRequired[list[Comparison]]
    breakdowns: NotRequired[Breakdowns]
    diverged: NotRequired[dict[str, str]]
