"""Tuning hand-made rules on the meta split, with the articles that the learned rule is trained on.

Half of the trials are Optuna's TPE over η, ε and λ on log scales, the other half a pattern search from the best of
them: each setting is doubled and halved, then moved by √2, and so on, while that helps. ε is searched in units of the
mean static RMS, so that the same ranges serve models of every size. Trials that fall behind the median after the same
articles are cut short.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import optuna

from dynlm.adapt import Reader
from dynlm.optim.base import Rule
from dynlm.optim.library import make_rule
from dynlm.types import InputError, TokenizedArticle


@dataclass(frozen=True)
class TuneConfig:
    """Search for the settings of hand-made rules."""

    rules: tuple[str, ...] = ("sgd", "rms", "adam")
    """rules to tune, each on its own"""
    trials: int = 40
    """settings tried a rule"""
    articles: int = 16
    """meta-training articles read a trial"""
    max_tokens: int = 4096
    """each article is read up to this many tokens"""
    seed: int = 0

    def excerpts(self, articles: Sequence[TokenizedArticle]) -> list[TokenizedArticle]:
        """What is read in a trial."""
        most = self.max_tokens or None
        return [dataclasses.replace(article, ids_T=article.ids_T[:most]) for article in articles[: self.articles]]


class Range(NamedTuple):
    """A log-uniform range; ``relative`` ones are multiplied by the mean static RMS."""

    low: float
    high: float
    start: float
    relative: bool = False


SPACES: dict[str, dict[str, Range]] = {
    "sgd": {"lr": Range(1e-2, 1e2, 1.0), "decay": Range(1e-6, 3e-1, 1e-3)},
    "rms": {
        "lr": Range(1e-5, 1e-1, 2e-3),
        "eps": Range(1e-3, 1e1, 0.5, relative=True),
        "decay": Range(1e-6, 3e-1, 1e-3),
    },
    "adam": {
        "lr": Range(1e-5, 1e-1, 1e-3),
        "eps": Range(1e-4, 1e2, 0.1, relative=True),
        "decay": Range(1e-6, 3e-1, 1e-3),
    },
}


class Tuned(NamedTuple):
    """The best settings found; ``at_bound`` names those within 5 % (in logs) of the edge of their range."""

    rule: Rule
    nats_per_token: float
    trials: int
    at_bound: tuple[str, ...]


def tune_rule(
    kind: str,
    reader_for: Callable[[Rule], Reader],
    articles: Sequence[TokenizedArticle],
    start_id: int,
    config: TuneConfig,
    progress: Callable[[], object] | None = None,
) -> Tuned:
    """Minimise nats per token of reading ``articles`` (cut to ``max_tokens``); repeatable for a seed on one machine."""
    if kind not in SPACES:
        raise InputError(f"rule {kind!r} has no search space: tune one of {', '.join(SPACES)}")
    texts = config.excerpts(articles)
    if not texts:
        raise InputError("no article to tune on: the meta split is empty (data.meta_articles)")
    unit = 1 / reader_for(make_rule("static")).priors[0].relative_rms
    space = {name: _scaled(r, unit) for name, r in SPACES[kind].items()}

    def objective(trial: optuna.Trial) -> float:
        settings = {name: trial.suggest_float(name, r.low, r.high, log=True) for name, r in space.items()}
        nats, tokens = 0.0, 0
        with reader_for(make_rule(kind, **settings)) as reader:
            for number, article in enumerate(texts):
                try:
                    nats += float(reader.read(article, start_id).double().sum())
                except InputError as error:  # the loss ran away: a bad setting, not a bad run
                    raise optuna.TrialPruned from error
                tokens += len(article)
                trial.report(nats / tokens, number)
                if number + 1 < len(texts) and trial.should_prune():
                    raise optuna.TrialPruned
        return nats / tokens

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=min(10, max(2, config.trials // 4))),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2),
    )
    study.enqueue_trial({name: r.start for name, r in space.items()})

    def count(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if progress:
            progress()

    study.optimize(objective, n_trials=max(1, config.trials // 2), callbacks=[count])
    _pattern_search(study, objective, config.trials, space, count)
    try:
        best = study.best_trial
    except ValueError:
        raise InputError(f"every trial of rule {kind!r} ran away: the base model or the text is broken") from None
    assert best.value is not None
    at_bound = tuple(name for name, r in space.items() if _at_bound(best.params[name], r))
    return Tuned(make_rule(kind, **best.params), best.value, len(study.trials), at_bound)


def _pattern_search(
    study: optuna.Study,
    objective: Callable[[optuna.Trial], float],
    n_trials: int,
    space: dict[str, Range],
    callback: Callable[[optuna.Study, optuna.trial.FrozenTrial], None],
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
                study.optimize(objective, n_trials=1, callbacks=[callback])
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


def _scaled(r: Range, unit: float) -> Range:
    return Range(r.low * unit, r.high * unit, r.start * unit) if r.relative else r


def _at_bound(value: float, r: Range) -> bool:
    where = math.log(value / r.low) / math.log(r.high / r.low)
    return not 0.05 < where < 0.95
