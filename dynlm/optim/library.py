"""Rules by name, and rules on disk: one safetensors file a rule, with its kind and configuration beside the numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynlm import runs
from dynlm.optim.base import Prior, Rule
from dynlm.optim.diagonal import Diagonal
from dynlm.optim.gated import Gated
from dynlm.optim.general import General
from dynlm.optim.handmade import RMS, SGD, Adam, HandMade, Static
from dynlm.optim.learned import Learned
from dynlm.optim.linear import Linear
from dynlm.optim.mlp import MLP
from dynlm.optim.recurrent import GRUCell, LSTMCell
from dynlm.settings import build, shown
from dynlm.types import InputError

HANDMADE: dict[str, type[Rule]] = {"static": Static, "sgd": SGD, "rms": RMS, "adam": Adam}
LEARNED: dict[str, type[Learned] | type[Linear]] = {
    "linear": Linear,
    "gated": Gated,
    "diagonal": Diagonal,
    "lstm": LSTMCell,
    "gru": GRUCell,
    "mlp": MLP,
}


def make_rule(kind: str, **settings: Any) -> Rule:
    """A fresh rule; ``settings`` are a hand-made rule's arguments, or fields of a learned cell's configuration."""
    if kind in HANDMADE:
        return HANDMADE[kind](**settings)
    make = _cell(kind)
    rule: Rule = make(make.config_class(**settings))
    return rule


def _cell(kind: str) -> Any:
    """The class of a learned rule."""
    if kind not in LEARNED and kind != General.name:
        raise InputError(f"unknown rule {kind!r}: choose one of {', '.join([*HANDMADE, *LEARNED, General.name])}")
    return LEARNED.get(kind, General)


def seeded(name: str, seed: int) -> str:
    """What a rule or stage of this seed is called: ``gated``, ``gated#1``."""
    return f"{name}#{seed}" if seed else name


def seedless(name: str) -> str:
    """The counterpart of :func:`seeded`, also for ``gated#1+cache`` and ``gated#1@fomaml``."""
    return re.sub(r"#\d+", "", name)


def start_rule(kind: str, settings: dict[str, float], priors: Sequence[Prior], seed: int = 0, hidden: int = 0) -> Rule:
    """A learned cell at the hand-made rule (``LEARNED[kind].start``) with these tuned settings; 0: its own size."""
    if kind not in LEARNED:
        raise InputError(f"{kind!r} is not a learned rule: choose one of {', '.join(LEARNED)}")
    sizes = {"hidden": hidden} if hidden and kind != "linear" else {}
    rule: Rule = LEARNED[kind].started_at(settings, priors, seed, **sizes)
    return rule


def rule_config(rule: Rule) -> dict[str, Any]:
    """The configuration of a learned cell; hand-made rules need none."""
    return asdict(rule.config) if rule.config else {}


def save_rule(rule: Rule, path: Path, made: runs.Json | None = None) -> None:
    """Write a rule; ``made`` tells how it was found (objective, trials, steps, …)."""
    runs.write_tensors(path, rule.state_dict(), {"kind": rule.name, "config": rule_config(rule), "made": made or {}})


def load_rule(path: str | Path) -> tuple[Rule, runs.Json]:
    """(rule, how it was made).

    Raises:
        InputError: a file that holds no whole rule, settings or numbers that no rule has.
    """
    tensors, meta = runs.read_tensors(Path(path))
    kind, config, made = meta.get("kind"), meta.get("config", {}), meta.get("made", {})
    if not (isinstance(kind, str) and isinstance(config, dict) and isinstance(made, dict)):
        raise InputError(f"{path} is no rule: its kind is {shown(kind)}; make it again")
    if kind in HANDMADE:
        rule = HANDMADE[kind]()
    else:
        make = _cell(kind)
        rule = make(build(make.config_class, config, f"{path}: config"))
    named = seedless(Path(path).name)
    if named != kind and (named in HANDMADE or named in LEARNED):
        raise InputError(f"{path} holds a rule of kind {kind!r}, not {named!r}: make it again")
    runs.require_layout(path, tensors, rule.state_dict())
    rule.load_state_dict(tensors)
    if isinstance(rule, HandMade):
        rule.require_bounds(str(path))
    return rule, made
