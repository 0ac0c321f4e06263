"""Tuning hand-made rules on the meta split, with the articles that the learned rule is trained on.

Half of the trials are Optuna's TPE over η, ε and λ on log scales, the other half a pattern search from the best of
them: each setting is doubled and halved, then moved by √2, and so on, while that helps. ε is searched in units of the
mean static RMS of the gradient, and η by what a step promises to first order, so that the same ranges serve models of
every size; where reading diverges even so, η is divided by 4 until it does not. Trials that fall behind the median
after the same articles are cut short.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

from dynlm.evaluation.stream import read_articles
from dynlm.inner import InnerLoop
from dynlm.lazy import optional
from dynlm.methods import Method, MethodName
from dynlm.optim.base import Prior, Rule
from dynlm.optim.library import make_rule
from dynlm.optim.registry import RULES, Range, tuned
from dynlm.processes import count, spread
from dynlm.settings import Count, NotEmpty, Seed, Settings, Whole
from dynlm.types import DivergedError, InputError, TokenizedArticle

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class TuneConfig(Settings):
    """Search for the settings of hand-made rules."""

    rules: Annotated[tuple[MethodName, ...], NotEmpty()] = ("sgd", "rms", "adam")
    """rules to tune, each on its own; then caches (METHOD+cache) and mixtures (METHOD+mix), as they are given"""
    trials: Count = 40
    """settings tried a rule"""
    articles: Count = 16
    """meta-training articles read a trial"""
    max_tokens: Whole = 4096
    """each article is read up to this many tokens"""
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.rules:
            if name not in tuned() and not Method.parse(name).beside:
                known = ", ".join(tuned())
                raise InputError(f"rules names {name!r}: choose from {known}, cache, METHOD+cache and METHOD+mix")

    def excerpts(self, articles: Sequence[TokenizedArticle]) -> list[TokenizedArticle]:
        """Return what is read in a trial."""
        most = self.max_tokens or None
        return [dataclasses.replace(article, ids_T=article.ids_T[:most]) for article in articles[: self.articles]]


LARGEST_STEP = 1.25e-3
"""of a weight, for each nat that the loss would fall by"""
TINY = 1e-6
"""the ε, in mean static RMS, of a rule that steps along the direction of the gradient without one"""


def search_space(kind: str, priors: Sequence[Prior]) -> dict[str, Range]:
    """Return what is searched for a hand-made rule on the model that ``priors`` belong to, in the rule's own units."""
    rms, space = 1 / priors[0].relative_rms, RULES[kind].space
    eps = rms * (space["eps"].start if "eps" in space else TINY)
    squares = [prior.rms.double().square() for prior in priors]
    falls = {  # of the loss, in a step of rate 1, if it were linear
        "gradient": sum(float(r2.sum()) for r2 in squares),
        "direction": sum(float((r2 / (p.rms.double() + eps)).sum()) for r2, p in zip(squares, priors, strict=True)),
    }
    # few weights, such as low-rank ones, take no larger steps
    units = {"": 1.0, "rms": rms, "gradient": min(1 / falls["gradient"], LARGEST_STEP / rms)}
    units["direction"] = min(1 / falls["direction"], LARGEST_STEP)
    return {name: r.times(units[r.unit]) for name, r in space.items()}


STEP_DOWN, STEPS_DOWN = 4.0, 6  # of the rate; how often for settings that lose, yet do not diverge


class Tuned(NamedTuple):
    """The best settings found; ``at_bound`` names those within 5 % (in logs) of the edge of their range."""

    rule: Rule
    nats_per_token: float
    trials: int
    at_bound: tuple[str, ...]
    static: float
    """nats per token without learning, on the same text"""


def tune_rule(
    kind: str,
    reader_for: Callable[[Rule], InnerLoop],
    articles: Sequence[TokenizedArticle],
    start_id: int,
    config: TuneConfig,
    progress: Callable[[], object] | None = None,
) -> Tuned:
    """Minimise nats per token of reading ``articles`` (cut to ``max_tokens``); repeatable for a seed on one machine.

    Raises:
        InputError: a rule without search space, no article.
        DivergedError: no setting that was tried reads to the end.
    """
    with optional("tuning"):
        import optuna

    if kind not in tuned():
        raise InputError(f"rule {kind!r} has no search space: tune one of {', '.join(tuned())}")
    texts = config.excerpts(articles)
    if not texts:
        raise InputError("no article to tune on: the meta split is empty", setting="data.meta_articles")
    space = search_space(kind, reader_for(make_rule("static")).priors)

    def objective(trial: optuna.Trial) -> float:
        settings = {name: trial.suggest_float(name, r.low, r.high, log=True) for name, r in space.items()}
        nats, tokens = 0.0, 0
        with reader_for(make_rule(kind, **settings)) as reader:
            for number, (article, found) in enumerate(zip(texts, _read_ahead(reader, texts, start_id), strict=True)):
                if isinstance(found, DivergedError):  # a bad setting, not a bad run
                    raise optuna.TrialPruned from found
                nats, tokens = nats + found, tokens + len(article)
                trial.report(nats / tokens, number)
                if number + 1 < len(texts) and trial.should_prune():
                    raise optuna.TrialPruned
        return nats / tokens

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # or Ctrl-C prints its traceback
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=min(10, max(2, config.trials // 4))),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2),
    )

    def tell(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if progress:
            progress()

    def attempt(n_trials: int) -> None:
        study.optimize(objective, n_trials=n_trials, callbacks=[tell])

    half = max(1, config.trials // 2)
    static = read_articles(reader_for(make_rule("static")), texts, start_id).nats / sum(map(len, texts))
    _step_down(study, attempt, half, space, static)
    if _best_params(study) is not None and len(study.trials) < half:
        attempt(half - len(study.trials))
    _pattern_search(study, attempt, config.trials, space)
    if _best_params(study) is None:
        lowest = min(trial.params["lr"] for trial in study.trials)
        raise DivergedError(
            f"reading with rule {kind!r} diverged at each of {len(study.trials)} settings, down to lr {lowest:.2g}: "
            "more trials try lower ones",
            setting="tune.trials",
        )
    best = study.best_trial
    assert best.value is not None
    at_bound = tuple(name for name, r in space.items() if _at_bound(best.params[name], r))
    return Tuned(make_rule(kind, **best.params), best.value, len(study.trials), at_bound, static)


def _read_ahead(reader: InnerLoop, texts: Sequence[TokenizedArticle], start_id: int) -> Iterator[float | DivergedError]:
    """Yield the nats of each article, or how its reading ended; as many are read at once as there are processes."""

    def read(number: int) -> float | DivergedError:
        try:
            return float(reader.read(texts[number], start_id).double().sum())
        except DivergedError as error:
            return error

    for first in range(0, len(texts), count()):
        ahead = range(len(texts))[first : first + count()]
        costs = [float(len(texts[number])) for number in ahead]
        yield from spread(lambda i, ahead=ahead: read(ahead[i]), costs, divided=reader.config.reset == "article")  # type: ignore[misc]


def _step_down(
    study: optuna.Study, attempt: Callable[[int], None], most: int, space: dict[str, Range], static: float
) -> None:
    """Try the start of ``space``, and move its rates down while reading diverges, or a few times where it loses."""
    while len(study.trials) < most:
        study.enqueue_trial({name: r.start for name, r in space.items()})
        attempt(1)
        finite = _best_params(study) is not None
        if finite and (study.best_value < static or len(study.trials) >= STEPS_DOWN):
            return
        space["lr"] = space["lr"].times(1 / STEP_DOWN)


def _pattern_search(
    study: optuna.Study, attempt: Callable[[int], None], n_trials: int, space: dict[str, Range]
) -> None:
    """Up to ``n_trials`` in all: one setting at a time, from the best so far; steps shrink when none helps."""
    factor, tried = 2.0, {_rounded(trial.params) for trial in study.trials}
    while factor > 1.05:
        before = _best_params(study)
        if before is None:
            return
        for name, step in itertools.product(space, (factor, 1 / factor)):
            if len(study.trials) >= n_trials:
                return
            best = _best_params(study)
            assert best is not None
            value = min(max(best[name] * step, space[name].low), space[name].high)
            candidate = {**best, name: value}
            if _rounded(candidate) not in tried:
                tried.add(_rounded(candidate))
                study.enqueue_trial(candidate)
                attempt(1)
        if _best_params(study) == before:
            factor = math.sqrt(factor)


def _best_params(study: optuna.Study) -> dict[str, float] | None:
    try:
        return study.best_trial.params
    except ValueError:  # no trial came to its end
        return None


def _rounded(params: dict[str, float]) -> tuple[float, ...]:
    """Settings to 1 %, in the order of their names."""
    return tuple(round(100 * math.log(params[name])) for name in sorted(params))


def _at_bound(value: float, r: Range) -> bool:
    where = math.log(value / r.low) / math.log(r.high / r.low)
    return not 0.05 < where < 0.95
