"""Settings: frozen dataclasses whose fields say what they may hold, and values of files checked against types.

    @dataclass(frozen=True)
    class TrainConfig(Settings):
        epochs: Count = 8
        lr: Positive = 3e-3

One check serves both: whoever makes a :class:`Settings`, in Python, from a recipe or from flags, gets one line with
name, value and bound for what does not fit. Numbers are finite unless their bound says otherwise.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from dynlm.types import InputError


@dataclass(frozen=True)
class Bound:
    """What a number may be: from ``least`` or above ``above``, to ``most`` or below ``below``."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    finite: bool = True
    """refuse NaN and the infinities; False: only NaN"""

    def holds(self, value: float) -> bool:
        """Return whether ``value`` keeps to the bound."""
        return (
            (math.isfinite(value) if self.finite else not math.isnan(value))
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        edges = (("from", self.least), ("above", self.above), ("to", self.most), ("below", self.below))
        said = " and ".join(f"{word} {edge:,}" for word, edge in edges if edge is not None)
        return said.replace(" and to ", " to ")


@dataclass(frozen=True)
class NotEmpty:
    """A list that names at least one thing."""


@dataclass(frozen=True)
class Form:
    """The form of a text, as a regular expression and in words."""

    pattern: str
    words: str


FINITE = Bound()
NAMES = {str: "text", bool: "true or false"}
MANY, WIDE = 10**9, 2**16
LARGE = 1e30  # far within single precision
Count = Annotated[int, Bound(1, MANY)]
"""steps, articles, tokens, MiB"""
Whole = Annotated[int, Bound(0, MANY)]
"""a count where zero means something"""
Size = Annotated[int, Bound(1, WIDE)]
"""what memory or processes grow with: units, rows, tasks side by side"""
Seed = Annotated[int, Bound(0, 2**32 - 1)]
Finite = Annotated[float, Bound(-LARGE, LARGE)]
AnyFloat = Annotated[float, Bound(finite=False)]
"""infinite too, as the best loss before the first"""
Positive = Annotated[float, Bound(above=0, most=LARGE)]
NotNegative = Annotated[float, Bound(0, LARGE)]
Share = Annotated[float, Bound(least=0, below=1)]
Log2 = Annotated[float, Bound(-100, 100)]
Decay = Annotated[float, Bound(above=0, below=1)]
"""of a running mean that is learned by its logit"""


class Settings:
    """Base of configurations: fields are checked, and brought to their types, when one is made."""

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value = getattr(self, field.name)
            checked = check(hints[field.name], value, f"{type(self).__name__}.{field.name}")
            if checked is not value:
                object.__setattr__(self, field.name, checked)


def as_json(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON gives it back: tuples are lists."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return settings


def hints_of(kind: Any) -> dict[str, Any]:
    """Return the types of a class's fields, or of a function's arguments, with their bounds."""
    return _hints(kind)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def build(kind: type[Any], values: Any, where: str, default: Any = None) -> Any:
    """Return a (nested) dataclass or named tuple from plain values, every key, type and bound checked.

    What ``values`` lack is ``default``'s, or the type's own default.

    Raises:
        InputError: an unknown key (with the nearest known one), a missing key, a wrong type, a number out of bounds.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is {shown(values)}: expected a [table] of settings")
    hints, settings = hints_of(kind), dict[str, Any]()
    default = _default(kind) if default is None else default
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f": did you mean {close[0]!r}?" if close else f": known are {', '.join(hints)}"
            raise InputError(f"{where}: unknown key {shown(key)}{hint}")
        settings[key] = check(hints[key], value, f"{where}: {key}", getattr(default, key, None))
    if default is not None:
        settings = {name: getattr(default, name) for name in hints} | settings
    try:
        return kind(**settings)
    except TypeError as error:
        raise InputError(f"{where}: {str(error).partition(' ')[2]}") from None
    except InputError as error:  # settings that do not go together
        raise InputError(f"{where}: {error}") from None


def _default(kind: type[Any]) -> Any:
    """One with nothing given, where that can be made."""
    try:
        return kind()
    except TypeError:
        return None


def check(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    """``value`` as the type ``hint``: a list becomes a tuple, a whole number a float, a table a dataclass.

    Raises:
        InputError: a value of another type or out of bounds; the line names ``where``.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _marked(arguments, value, where)
    if origin is NotRequired:
        return check(arguments[0], value, where, default)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        return value if isinstance(value, hint) else build(hint, value, where, default)
    if is_typeddict(hint):
        return _table(hint, value, where)
    if origin in (Union, types.UnionType):
        return _either(arguments, value, where)
    if origin is Literal:
        if value not in arguments or type(value) not in {type(a) for a in arguments}:
            raise InputError(f"{where} is {shown(value)}: expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (tuple, list):
        return _items(origin, arguments, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {shown(value)}: expected a table")
        return {check(arguments[0], key, where): check(arguments[1], v, f"{where}.{key}") for key, v in value.items()}
    return _plain(hint, value, where)


def _marked(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return a value whose type carries bounds."""
    hint, *marks = arguments
    bound = next((mark for mark in marks if isinstance(mark, Bound)), FINITE)
    value = _plain(hint, value, where, bound) if hint in (int, float) else check(hint, value, where)
    for mark in marks:
        if isinstance(mark, NotEmpty) and not value:
            raise InputError(f"{where} is empty: name at least one")
        if isinstance(mark, Form) and not re.fullmatch(mark.pattern, value):
            raise InputError(f"{where} is {shown(value)}: expected {mark.words}")
    return value


def _plain(hint: Any, value: Any, where: str, bound: Bound = FINITE) -> Any:
    """Text, a truth value or a number."""
    if hint in (int, float):
        number = isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
        if not number or not _holds(bound, value):
            kind = "a whole number" if hint is int else "a finite number" if bound.finite else "a number"
            raise InputError(f"{where} is {shown(value)}: expected {f'{kind} {bound}'.strip()}")
        return hint(value)
    if not isinstance(value, hint):
        raise InputError(f"{where} is {shown(value)}: expected {NAMES.get(hint, hint)}")
    if hint is str and "\0" in value:
        raise InputError(f"{where} is {shown(value)}: expected text without NUL")
    return value


def _holds(bound: Bound, value: Any) -> bool:
    try:
        return bound.holds(float(value))
    except OverflowError:  # a whole number beyond all floats
        return False


def _items(origin: Any, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return a list, or a tuple of any or of a fixed length."""
    if not isinstance(value, list | tuple):
        raise InputError(f"{where} is {shown(value)}: expected a list")
    hints = arguments[:1] * len(value) if origin is list or arguments[-1] is ... else arguments
    if len(hints) != len(value):
        raise InputError(f"{where} has {len(value)} items: expected {len(hints)}")
    return origin(check(hint, item, where) for hint, item in zip(hints, value, strict=True))


def _table(hint: Any, value: Any, where: str) -> Any:
    """Return a JSON object with at least the keys of a TypedDict; it may hold more."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is {shown(value)}: expected a table")
    hints = hints_of(hint)
    needed = [key for key, of_key in hints.items() if hint.__total__ and get_origin(of_key) is not NotRequired]
    missing = sorted(set(needed) - set(value))
    if missing:
        raise InputError(f"{where} lacks {', '.join(map(repr, missing))}")
    return {key: check(hints[key], v, f"{where}: {key}") if key in hints else v for key, v in value.items()}


def _either(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return a value of one type among several, or None; the error is that of the first."""
    if value is None and type(None) in arguments:
        return None
    first, *others = (a for a in arguments if a is not type(None))
    for hint in others:
        with suppress(InputError):
            return check(hint, value, where)
    return check(first, value, where)


def shown(value: Any) -> str:
    """Return a value in a message: at most some 80 characters of it."""
    try:
        text = repr(value)
    except ValueError:  # a number of more than 4,300 digits
        return "a number without end"
    return text if len(text) <= 80 else f"{text[:76]} …"
