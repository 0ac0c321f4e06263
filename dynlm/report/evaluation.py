"""Read a finished evaluation back from a run directory, and refuse one that does not fit together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dynlm.runs import Json, Run, read_json, read_tensors
from dynlm.types import InputError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SCHEMA = 1
STATIC = "static"
HAND_MADE = frozenset({"sgd", "rms", "adam", "cache"})
AGAIN = "run `dynlm evaluate` again"

RESULT_KEYS = ("data", "reset", "segment", "model", "versions", "articles", "tokens", "words", "bytes", "methods")
DATA_KEYS = ("source", "split", "titles", "fingerprint")
METHOD_KEYS = ("nats", "token_ppl", "word_ppl", "bits_per_byte", "gain_nats_per_token", "gain_ci95", "tokens_per_s")
COMPARISON_KEYS = ("better", "worse", "gain_nats_per_token", "ci95")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """``gains``: static loss minus method loss for every method but static, (T,) nats a token."""

    results: Json
    gains: dict[str, Floats]
    article_T: Ints

    @property
    def names(self) -> list[str]:
        """Static first, then by falling word perplexity: the best method stands last."""
        methods = self.results["methods"]
        return [STATIC, *sorted(self.gains, key=lambda name: (-methods[name]["word_ppl"], name))]

    @property
    def titles(self) -> list[str]:
        titles: list[str] = self.results["data"]["titles"]
        return titles

    def kind(self, name: str) -> str:
        """``baseline``, ``hand-made`` or ``learned``, by the method's name."""
        if name == STATIC:
            return "baseline"
        return "hand-made" if name.removesuffix("+cache") in HAND_MADE else "learned"

    def best(self, kind: str) -> str | None:
        """The method of this kind with the lowest word perplexity, if there is one."""
        return next((name for name in reversed(self.names) if self.kind(name) == kind), None)


def load_evaluation(run: Run) -> Evaluation:
    """The evaluation of ``run``; :class:`InputError` where it is missing, of another schema, or inconsistent."""
    results = read_json(run.require(run.results, "evaluate"))
    _check_results(run.results, results)
    tensors, _ = read_tensors(run.require(run.losses, "evaluate"))
    losses = {name: _losses(run.losses, tensors, results, name) for name in results["methods"]}
    article_T = _tokens(run.losses, tensors, "article", results["tokens"]).numpy().astype(np.int64)
    titles = len(results["data"]["titles"])
    if article_T.min() < 0 or article_T.max() >= titles:
        raise InputError(f"{run.losses} names article {article_T.max()}, {run.results} has {titles} titles: {AGAIN}")
    gains = {name: losses[STATIC] - loss for name, loss in losses.items() if name != STATIC}
    return Evaluation(results, gains, article_T)


def _check_results(path: Path, results: Json) -> None:
    if results.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {results.get('schema')!r}, this version reads {SCHEMA}: {AGAIN}")
    _check_keys(path, "results", results, RESULT_KEYS)
    _check_keys(path, "data", results["data"], DATA_KEYS)
    _check_keys(path, "methods", results["methods"], (STATIC,))
    for name, method in results["methods"].items():
        _check_keys(path, f"method {name!r}", method, METHOD_KEYS)
    for comparison in results.get("comparisons", []):
        _check_keys(path, "a comparison", comparison, COMPARISON_KEYS)
        _check_keys(path, "methods", results["methods"], (comparison["better"], comparison["worse"]))
    if results["tokens"] < 1:
        raise InputError(f"{path} has {results['tokens']} tokens, a report needs at least 1: evaluate some articles")


def _check_keys(path: Path, where: str, value: object, keys: Iterable[str]) -> None:
    missing = [key for key in keys if key not in value] if isinstance(value, dict) else list(keys)
    if missing:
        raise InputError(f"{path}: {where} lacks {', '.join(map(repr, missing))}: {AGAIN}")


def _tokens(path: Path, tensors: dict[str, torch.Tensor], key: str, tokens: int) -> torch.Tensor:
    """The tensor ``key``, one value a token, or an error."""
    if key not in tensors:
        raise InputError(f"{path} has no {key!r}, which results.json needs: {AGAIN}")
    if tensors[key].shape != (tokens,):
        count = tensors[key].numel()
        raise InputError(f"{path} has {count} tokens in {key!r}, results.json has {tokens}: {AGAIN}")
    return tensors[key]


def _losses(path: Path, tensors: dict[str, torch.Tensor], results: Json, name: str) -> Floats:
    """(T,) nats. The sum must be that of results.json, else figures and table would tell of two evaluations."""
    losses: Floats = _tokens(path, tensors, f"losses/{name}", results["tokens"]).numpy().astype(np.float64)
    nats = results["methods"][name]["nats"]
    if not np.isclose(losses.sum(), nats, rtol=1e-3):
        raise InputError(f"{path} sums to {losses.sum():.1f} nats for {name!r}, results.json has {nats:.1f}: {AGAIN}")
    return losses
