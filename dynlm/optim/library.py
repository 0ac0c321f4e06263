"""Rules by name, and rules on disk: one safetensors file a rule, with its kind and configuration beside the numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynlm import runs
from dynlm.optim.base import Rule
from dynlm.optim.handmade import RMS, SGD, Adam, Static
from dynlm.optim.learned import Gated, GatedConfig
from dynlm.types import InputError

HANDMADE: dict[str, type[Rule]] = {"static": Static, "sgd": SGD, "rms": RMS, "adam": Adam}
LEARNED: dict[str, type[Rule]] = {"gated": Gated}


def make_rule(kind: str, **settings: Any) -> Rule:
    """A fresh rule; ``settings`` are its constructor's arguments (for ``gated``: fields of ``GatedConfig``)."""
    if kind in HANDMADE:
        return HANDMADE[kind](**settings)
    if kind == "gated":
        return Gated(GatedConfig(**settings))
    raise InputError(f"unknown rule {kind!r}: choose one of {', '.join([*HANDMADE, *LEARNED])}")


def rule_config(rule: Rule) -> dict[str, Any]:
    """The constructor's arguments of a rule whose sizes depend on them; hand-made rules need none."""
    return asdict(rule.config) if isinstance(rule, Gated) else {}


def save_rule(rule: Rule, path: Path, made: runs.Json | None = None) -> None:
    """Write a rule; ``made`` tells how it was found (objective, trials, steps, …)."""
    runs.write_tensors(path, rule.state_dict(), {"kind": rule.name, "config": rule_config(rule), "made": made or {}})


def load_rule(path: Path) -> tuple[Rule, runs.Json]:
    """(rule, how it was made). A truncated or foreign file is one clear line."""
    tensors, meta = runs.read_tensors(path)
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in meta.get("config", {}).items()}
    try:
        rule = make_rule(meta.get("kind", ""), **config)
        rule.load_state_dict(tensors)
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path} is not a rule of this version ({reason}): make it again") from None
    return rule, meta.get("made", {})
