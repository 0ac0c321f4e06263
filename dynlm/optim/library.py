"""Rules by name, and rules on disk: one safetensors file a rule, with its kind and configuration beside the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynlm.files import Json, read_tensors, require_layout
from dynlm.methods import Method
from dynlm.optim.base import Prior, Rule
from dynlm.optim.handmade import HandMade
from dynlm.optim.registry import RULES, row_of, trained
from dynlm.settings import build, hints_of, shown
from dynlm.types import InputError


def make_rule(name: str, **settings: Any) -> Rule:
    """Return a fresh rule; ``settings`` are arguments of its class, or fields of its configuration where it has one."""
    make: Any = row_of(name).rule
    rule: Rule = make(make.config_class(**settings)) if make.config_class else make(**settings)
    return rule


def start_rule(name: str, settings: dict[str, float], priors: Sequence[Prior], seed: int = 0, hidden: int = 0) -> Rule:
    """Return a learned cell at the rule that its row says it starts at, with these tuned settings; 0: its own size."""
    if not row_of(name).start:
        raise InputError(f"{name!r} is not a learned rule: choose one of {', '.join(trained())}")
    make: Any = RULES[name].rule
    sizes = {"hidden": hidden} if hidden and "hidden" in hints_of(make.config_class) else {}
    rule: Rule = make.started_at(settings, priors, seed, **sizes)
    return rule


def load_rule(path: str | Path) -> tuple[Rule, Json]:
    """Return (rule, how it was made).

    Raises:
        InputError: a file that holds no whole rule, settings or numbers that no rule has.
    """
    tensors, meta = read_tensors(Path(path))
    kind, config, made = meta.get("kind"), meta.get("config", {}), meta.get("made", {})
    if not (isinstance(kind, str) and isinstance(config, dict) and isinstance(made, dict)):
        raise InputError(f"{path} is no rule: its kind is {shown(kind)}; make it again")
    make: Any = row_of(kind).rule
    rule: Rule = make(build(make.config_class, config, f"{path}: config")) if make.config_class else make()
    method = Method.find(Path(path).name)
    if method and method.rule != kind and method.rule in RULES:
        raise InputError(f"{path} holds a rule of kind {kind!r}, not {method.rule!r}: make it again")
    require_layout(path, tensors, rule.state_dict())
    rule.load_state_dict(tensors)
    if isinstance(rule, HandMade):
        rule.require_bounds(str(path))
    return rule, made
