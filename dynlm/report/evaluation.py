"""Read a finished evaluation back from a run directory, and refuse one that does not fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dynlm.files import read_tensors, require_layout
from dynlm.methods import STATIC
from dynlm.results import AGAIN, Breakdowns, Results, load_results
from dynlm.runs import Run
from dynlm.types import InputError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SHOWN = 5  # methods in a figure: more do not tell apart


class GateCurves(NamedTuple):
    """COPY, UPDATE and FLUSH of a rule at each update of the first articles (dynlm.evaluation.gates)."""

    values_3UN: Floats
    """means over the weights of each of N tensors at each of U updates"""
    tensors: list[str]
    weights: list[int]
    """of each tensor"""
    updates: list[int]
    """of each article; U in all"""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """``losses``: nats of every token under every method, (T,)."""

    results: Results
    losses: Mapping[str, Floats]
    article_T: Ints
    ids_T: Ints | None = None
    gates: Mapping[str, GateCurves] = field(default_factory=dict)

    @cached_property
    def gains(self) -> dict[str, Floats]:
        """Static loss minus method loss for every method but static, (T,) nats a token."""
        static_T = self.losses[STATIC]
        return {name: static_T - loss_T for name, loss_T in self.losses.items() if name != STATIC}

    @property
    def names(self) -> list[str]:
        """The baselines first, static before all, then by falling loss: the best method stands last."""
        methods = self.results["methods"]
        ranked = sorted(self.losses, key=lambda name: (name != STATIC, -methods[name]["nats"], name))
        return sorted(ranked, key=self._adapts)

    def _adapts(self, name: str) -> bool:
        """Return whether a method differs from its baseline by more than what it forgets."""
        method = self.results["methods"][name]
        return method["kind"] != "baseline" or method["start"] is not None

    @property
    def adaptive(self) -> list[str]:
        """The methods that are no baselines, the best last."""
        return [name for name in self.names if self._adapts(name)]

    @property
    def shown(self) -> list[str]:
        """Those of the figures, the best last: the best of each kind, static with a cache, the best of the others."""
        ranked, methods = self.adaptive[::-1], self.results["methods"]
        caches = [name for name in ranked if methods[name]["cache"] and methods[name]["rule"] == STATIC]
        wanted = [self.best("learned"), self.best("hand-made", alone=True), *caches[:1]]
        chosen = [name for name in [*wanted, *ranked] if name in ranked]
        few = set(list(dict.fromkeys(chosen))[:SHOWN])
        return [name for name in self.adaptive if name in few]

    @property
    def titles(self) -> list[str]:
        return self.results["data"]["titles"]

    @property
    def breakdowns(self) -> Breakdowns:
        """Where reading gains; empty for an evaluation that does not say."""
        return self.results.get("breakdowns", {})

    def kind(self, name: str) -> str:
        """``baseline``, ``hand-made`` or ``learned``, as the evaluation wrote it."""
        return self.results["methods"][name]["kind"]

    def best(self, kind: str, alone: bool = False) -> str | None:
        """Return the method of this kind with the lowest loss, if there is one; ``alone``: no cache, no mixture."""
        fits = (n for n in reversed(self.names) if self.kind(n) == kind and not (alone and self._beside(n)))
        return next(fits, None)

    def _beside(self, name: str) -> bool:
        """Return whether a cache or a mixture stands beside the method's rule."""
        method = self.results["methods"][name]
        return method["cache"] or method.get("mix", False)


def load_evaluation(run: Run, vocab_size: int | None = None) -> Evaluation:
    """Return the evaluation of ``run``; :class:`InputError` where it is missing, of another schema, or inconsistent."""
    results = load_results(run.require(run.results, "evaluate"))
    tensors, _ = read_tensors(run.require(run.losses, "evaluate"))
    losses = {name: _losses(run.losses, tensors, results, name) for name in results["methods"]}
    article_T = _tokens(run.losses, tensors, "article", results["tokens"]).numpy().astype(np.int64)
    titles = len(results["data"]["titles"])
    if article_T.min() < 0 or article_T.max() >= titles:
        raise InputError(f"{run.losses} names article {article_T.max()}, {run.results} has {titles} titles: {AGAIN}")
    if "position" in tensors:
        _tokens(run.losses, tensors, "position", results["tokens"])
    ids_T = None
    if "ids" in tensors:
        ids_T = _tokens(run.losses, tensors, "ids", results["tokens"]).numpy().astype(np.int64)
        if ids_T.min() < 0 or (vocab_size and ids_T.max() >= vocab_size):
            held = ids_T.min() if ids_T.min() < 0 else ids_T.max()
            raise InputError(f"{run.losses} holds token {held}, the tokenizer has {vocab_size}: {AGAIN}")
    return Evaluation(results, losses, article_T, ids_T, _gates(run.losses, tensors, results))


def _tokens(path: Path, tensors: dict[str, torch.Tensor], key: str, tokens: int) -> torch.Tensor:
    """Return the tensor ``key``, one value a token, or an error."""
    if key not in tensors:
        raise InputError(f"{path} has no {key!r}, which results.json needs: {AGAIN}")
    if tensors[key].shape != (tokens,):
        count = tensors[key].numel()
        raise InputError(f"{path} has {count} tokens in {key!r}, results.json has {tokens}: {AGAIN}")
    layout = torch.zeros(tokens, dtype=torch.float32 if key.startswith("losses/") else torch.int32)
    require_layout(path, {key: tensors[key]}, {key: layout}, advice=f": {AGAIN}")
    return tensors[key]


def _losses(path: Path, tensors: dict[str, torch.Tensor], results: Results, name: str) -> Floats:
    """Return (T,) nats. The sum must be that of results.json, else figures and table would tell of two evaluations."""
    losses: Floats = _tokens(path, tensors, f"losses/{name}", results["tokens"]).numpy().astype(np.float64)
    nats = results["methods"][name]["nats"]
    if not np.isclose(losses.sum(), nats, rtol=1e-3):
        raise InputError(f"{path} sums to {losses.sum():.1f} nats for {name!r}, results.json has {nats:.1f}: {AGAIN}")
    return losses


def _gates(path: Path, tensors: dict[str, torch.Tensor], results: Results) -> dict[str, GateCurves]:
    gates = {}
    for name, told in results.get("breakdowns", {}).get("gates", {}).items():
        values = tensors.get(f"gates/{name}")
        shape = (3, sum(told["segments"]), len(told["tensors"]))
        if values is None or values.shape != shape:
            found = "none" if values is None else tuple(values.shape)
            raise InputError(f"{path} has gates of {name!r} of shape {found}, results.json says {shape}: {AGAIN}")
        require_layout(path, {name: values}, {name: torch.zeros(shape)}, advice=f": {AGAIN}")
        if len(told["weights"]) != len(told["tensors"]):
            raise InputError(f"{path}: gates of {name!r} have sizes of other tensors: {AGAIN}")
        gates[name] = GateCurves(values.numpy().astype(np.float64), told["tensors"], told["weights"], told["segments"])
    return gates
