"""Two runs side by side: the articles that both read, and paired differences over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch

from dynlm.files import Json, read_json
from dynlm.paired import bootstrap_ratio, holm, sign_flip_p
from dynlm.report.evaluation import Evaluation, load_evaluation
from dynlm.report.page import interval
from dynlm.report.plots import article_spans
from dynlm.results import Interval
from dynlm.runs import Run
from dynlm.stamps import KEY
from dynlm.types import InputError

FEWEST_ARTICLES = 8  # a bootstrap over fewer says nothing: the smallest p of a sign-flip test of five is 1/16
SIGNIFICANT = 0.05
Span = tuple[int, int]
Verdict = Literal["second", "first", "not separated", "equal", "too few articles"]


class Shared(NamedTuple):
    """An article that both runs read: its title, and where its tokens are in each."""

    title: str
    first: Span
    second: Span


class Difference(NamedTuple):
    """A method of the first run and one of the second on the shared articles; above zero, the second is better."""

    first: str
    second: str
    gain: float
    """nats, divided by the first run's tokens"""
    ci95: Interval
    p_holm: float
    """two-sided sign-flip test over articles, corrected for all methods that are compared"""
    verdict: Verdict
    """which is better, where interval and test agree"""
    gains: list[float]
    """of each article"""


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Two evaluations, and how they compare on the articles that they share.

    Raises:
        InputError: no article in common.
    """

    runs: tuple[Run, Run]
    first: Evaluation
    second: Evaluation

    @property
    def names(self) -> tuple[str, str]:
        """What to call the runs: their folders, or their whole paths where those are alike."""
        a, b = (run.path for run in self.runs)
        return (a.name, b.name) if a.name != b.name else (str(a), str(b))

    @cached_property
    def alike(self) -> bool:
        """Whether one token is the same in both: their tokenizers have the same fingerprint."""
        prints = [e.results.get("tokenizer", {}).get("fingerprint") for e in (self.first, self.second)]
        return prints[0] is not None and prints[0] == prints[1]

    @cached_property
    def shared(self) -> list[Shared]:
        """The articles of both, in the first run's order.

        Under one tokenizer, those of equal tokens; else those of equal titles, where both evaluations read the same
        split of the same data. Of articles that come several times, the k-th is paired with the k-th.
        """
        a, b = self.first.results["data"], self.second.results["data"]
        by_tokens = self.alike and self.first.ids_T is not None and self.second.ids_T is not None
        if not by_tokens and (a["fingerprint"], a["split"]) != (b["fingerprint"], b["split"]):
            raise InputError(
                f"{self.runs[0].path} and {self.runs[1].path} read other data with other tokenizers: "
                "evaluate both on the same articles"
            )
        first, second = (_articles(evaluation, by_tokens) for evaluation in (self.first, self.second))
        found = [Shared(title, span, second[key][1]) for key, (title, span) in first.items() if key in second]
        if not found:
            raise InputError(
                f"{self.runs[0].path} and {self.runs[1].path} have no article in common: evaluate both on the same"
            )
        return found

    @cached_property
    def differences(self) -> list[Difference]:
        """The best method of each run, then all methods that both have, the first run's best first."""
        a, b = self.first.names, self.second.names
        pairs = [(name, name) for name in reversed(a) if name in b]
        pairs = list(dict.fromkeys([(a[-1], b[-1]), *pairs]))
        per_article = [self._per_article(*pair) for pair in pairs]
        corrected = holm([sign_flip_p(gains) for gains in per_article])
        tokens = torch.tensor([stop - start for _, (start, stop), _ in self.shared])
        rows = []
        for (one, other), gains, p in zip(pairs, per_article, corrected, strict=True):
            ci95: Interval = list(bootstrap_ratio(gains, tokens))
            verdict = _verdict(gains, ci95, p)
            total, per_token = float(gains.sum() / tokens.sum()), (gains / tokens).tolist()
            rows.append(Difference(one, other, total, ci95, p, verdict, per_token))
        return rows

    def _per_article(self, first: str, second: str) -> torch.Tensor:
        """Return the nats of the first method minus those of the second, (articles,)."""
        a, b = self.first.losses[first], self.second.losses[second]
        return torch.tensor([float(a[slice(*s.first)].sum() - b[slice(*s.second)].sum()) for s in self.shared])

    def losses(self) -> list[tuple[str, float | None, float | None]]:
        """Return the nats of each method on the shared articles, by the first run's tokens; None: a run lacks it."""
        names = dict.fromkeys([*reversed(self.first.names), *reversed(self.second.names)])
        tokens = sum(stop - start for _, (start, stop), _ in self.shared)
        rows = []
        for name in names:
            a, b = self.first.losses.get(name), self.second.losses.get(name)
            of_first = None if a is None else sum(float(a[slice(*s.first)].sum()) for s in self.shared) / tokens
            of_second = None if b is None else sum(float(b[slice(*s.second)].sum()) for s in self.shared) / tokens
            rows.append((name, of_first, of_second))
        return rows

    def settings(self) -> list[tuple[str, object, object]]:
        """Return what differs of the models, versions and settings of the runs, by name."""
        a, b = (_described(run, e) for run, e in zip(self.runs, (self.first, self.second), strict=True))
        return [(name, a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)]

    def table(self) -> str:
        """Return a line for each difference."""
        a, b = self.names
        lines = [f"{len(self.shared)} articles of both; nats per token by which {b} is better than {a} [95 %]:"]
        for row in self.differences:
            ends = interval(row.ci95)
            told = f"[{ends[0]:+.4f}, {ends[1]:+.4f}]" if ends else "[no interval]"
            which = row.first if row.first == row.second else f"{row.second} over {row.first}"
            better = {"first": f"{a} is better", "second": f"{b} is better"}.get(row.verdict, row.verdict)
            lines.append(f"{which:>24}  {row.gain:+.4f} {told}  {better}")
        return "\n".join(lines)


def side_by_side(first: Run, second: Run) -> SideBySide:
    """Read two finished evaluations.

    Raises:
        InputError: an evaluation is missing or damaged, or they share no article.
    """
    found = SideBySide((first, second), load_evaluation(first), load_evaluation(second))
    _ = found.shared
    return found


def says(ci95: Interval) -> Literal["gain", "loss", "open"]:
    """``gain`` or ``loss`` where the interval excludes zero; ``open`` where it does not, or where there is none."""
    ends = interval(ci95)
    if ends is None or ends[0] <= 0 <= ends[1]:
        return "open"
    return "gain" if ends[0] > 0 else "loss"


def _verdict(gains: torch.Tensor, ci95: Interval, p: float) -> Verdict:
    if not gains.any():
        return "equal"
    if len(gains) < FEWEST_ARTICLES:
        return "too few articles"
    said = says(ci95)
    if said == "open" or p >= SIGNIFICANT:
        return "not separated"
    return "second" if said == "gain" else "first"


def _articles(evaluation: Evaluation, by_tokens: bool) -> dict[tuple[object, int], tuple[str, Span]]:
    """Return title and place of each article, by what tells it from others and how often that came before."""
    found: dict[tuple[object, int], tuple[str, Span]] = {}
    times: dict[object, int] = {}
    for start, stop in article_spans(evaluation.article_T):
        title = evaluation.titles[evaluation.article_T[start]]
        ids_T = evaluation.ids_T
        key: object = ids_T[start:stop].tobytes() if by_tokens and ids_T is not None else title
        found[key, times.get(key, 0)] = title, (start, stop)
        times[key] = times.get(key, 0) + 1
    return found


def _described(run: Run, evaluation: Evaluation) -> Json:
    """Return what a run was, flat: model, tokenizer, versions, data, and the settings of its recipe."""
    results = evaluation.results
    parts: Json = {name: results.get(name, {}) for name in ("model", "tokenizer", "versions")}
    parts |= {"data": {name: results["data"][name] for name in ("source", "split", "fingerprint")}}
    parts |= {name: results[name] for name in ("segment", "reset", "articles", "tokens")}
    if run.recipe.is_file():
        parts["recipe"] = {name: value for name, value in read_json(run.recipe).items() if name not in (KEY, "run")}
    return dict(_flat(parts))


def _flat(values: Mapping[str, object], before: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in values.items():
        rows += _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else [(before + name, value)]
    return rows
