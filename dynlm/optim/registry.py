"""The table of rules: a rule is one file and one row here, and tuning, meta-training, files and pages go by the row.

:func:`register` adds a rule of a program's own, which the commands and functions of that program then know too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dynlm.methods import STATELESS, Method
from dynlm.optim.base import Rule
from dynlm.optim.diagonal import Diagonal
from dynlm.optim.gated import Gated
from dynlm.optim.general import General
from dynlm.optim.handmade import RMS, SGD, Adam, Static
from dynlm.optim.linear import Linear
from dynlm.optim.mlp import MLP
from dynlm.optim.recurrent import GRUCell, LSTMCell
from dynlm.types import InputError


class Range(NamedTuple):
    """A log-uniform range and where its search starts, in units of the model at hand.

    Attributes:
        low: its lower end, above 0.
        high: its upper end.
        start: where the search starts.
        unit: "" is the number itself, "rms" the mean static RMS r of the gradient. For learning rates a nat that the
            loss of a segment would fall by to first order in one step: "gradient" of a step along g, "direction" of one
            along g / (r + ε).
    """

    low: float
    high: float
    start: float
    unit: Literal["", "rms", "gradient", "direction"] = ""

    def times(self, factor: float) -> Range:
        """Return the range with all three numbers multiplied."""
        return Range(self.low * factor, self.high * factor, self.start * factor)


@dataclass(frozen=True)
class Row:
    """What the package knows of a rule beside its class, which has its name and kind."""

    rule: type[Rule]
    space: Mapping[str, Range]
    """what ``tune`` searches, by argument of the constructor, with "lr" among it; empty: the rule is not tuned"""
    start: str
    """the tuned rule at whose settings ``meta-train`` starts this one (``started_at``); empty: it does not train it"""


DECAY = Range(1e-6, 3e-1, 1e-3)
RULES: dict[str, Row] = {}
"""every rule by its name"""


def register(rule: type[Rule], space: Mapping[str, Range] | None = None, start: str = "") -> None:
    """Make a rule known by its name: to be made, saved, loaded, tuned in ``space`` and meta-trained from ``start``.

    Args:
        rule: a class with a ``name``. Without arguments its constructor must give a rule with these parameters, for its
            numbers to be loaded into.
        space: what tuning searches, by argument of the constructor, ``lr`` among them; None: it is not tuned.
        start: the tuned rule at whose settings meta-training starts this one (``started_at``); "": it is not trained.

    Raises:
        InputError: a name that is taken or that no method can have, a space or a start that does not fit the rule.
    """
    name, space = rule.name, dict(space or {})
    taken = RULES.get(name)
    if taken and (taken.rule.__module__, taken.rule.__qualname__) != (rule.__module__, rule.__qualname__):
        raise InputError(f"a rule {name!r} is there already ({taken.rule.__qualname__}): give yours another name")
    if Method.find(name) != Method(name) or name == STATELESS:
        raise InputError(f"no rule can be called {name!r}: take letters, digits and _, as in my_rule")
    arguments = inspect.signature(rule).parameters
    for argument in arguments.values():
        if argument.default is argument.empty and argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            raise InputError(f"rule {name!r} needs {argument.name!r} to be made: give it a default")
    if space and not {"lr"} <= set(space) <= set(arguments):
        raise InputError(
            f"the space of rule {name!r} has {', '.join(space)}: it must have lr, and no name that its constructor, "
            f"which takes {', '.join(arguments) or 'nothing'}, does not take"
        )
    if start and (start not in tuned() or not hasattr(rule, "started_at")):
        raise InputError(
            f"rule {name!r} cannot start at {start!r}: it needs `started_at` and one of {', '.join(tuned())}"
        )
    RULES[name] = Row(rule, space, start)


def row_of(name: str) -> Row:
    """Return the row of a rule.

    Raises:
        InputError: a name that is not in the table.
    """
    if name not in RULES:
        raise InputError(f"unknown rule {name!r}: choose one of {', '.join(RULES)}, or dynlm.optim.register yours")
    return RULES[name]


def tuned() -> list[str]:
    """Return the names of the rules that ``tune`` tunes."""
    return [name for name, row in RULES.items() if row.space]


def trained() -> list[str]:
    """Return the names of the learned cells that ``meta-train`` trains."""
    return [name for name, row in RULES.items() if row.start]


def untrained() -> list[str]:
    """Return the names of the rules that need no meta-training: they can be made from their defaults."""
    return [name for name, row in RULES.items() if row.rule.kind != "learned"]


def made_by(rule: str) -> str:
    """Return the command that makes a file of the rule, ``tune`` where nobody knows it."""
    row = RULES.get(rule)
    return "tune" if row is None or row.space else "meta-train" if row.start else "learn-optimizer"


register(Static)
register(SGD, {"lr": Range(2e-2, 2e2, 1.6, "gradient"), "decay": DECAY})
register(RMS, {"lr": Range(8e-3, 8e1, 1.6, "direction"), "eps": Range(1e-3, 1e1, 0.5, "rms"), "decay": DECAY})
register(Adam, {"lr": Range(8e-3, 8e1, 0.8, "direction"), "eps": Range(1e-4, 1e2, 0.1, "rms"), "decay": DECAY})
register(Linear, start="sgd")
register(Gated, start="rms")
register(Diagonal, start="rms")
register(LSTMCell, start="rms")
register(GRUCell, start="rms")
register(MLP, start="rms")
register(General)
