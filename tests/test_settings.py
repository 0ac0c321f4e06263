"""Settings: every number has a bound, and what does not keep to it is one line, before anything is read or written."""

import dataclasses
import math
import re
from typing import Annotated, Literal, NamedTuple, TypedDict, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlm.cli.main import main
from dynlm.cli.read import ReadSettings
from dynlm.evaluation.cache import CacheConfig
from dynlm.inner import ReadConfig
from dynlm.labs.general.tasks import TaskConfig
from dynlm.meta.replay import ReplayConfig
from dynlm.meta.tune import TuneConfig
from dynlm.meta.unroll import UnrollConfig
from dynlm.optim.general import GeneralConfig
from dynlm.optim.handmade import RMS, SGD, Adam
from dynlm.optim.registry import RULES
from dynlm.settings import Bound, build, check, hints_of
from dynlm.stages.recipe import Recipe
from dynlm.types import InputError

ODD = (-1, 0, 1, 2**40, 10**400, -1.0, 0.0, 2.0**40, math.nan, math.inf, -math.inf)
LIBRARY = [ReadConfig, CacheConfig, ReplayConfig, UnrollConfig, GeneralConfig, ReadSettings]
LIBRARY += [row.rule.config_class for row in RULES.values() if row.rule.config_class not in (None, GeneralConfig)]


def numbers(kind, path=()):
    """(path, type, bound) of every number among the settings of a class; those of a list too."""
    for name, hint in hints_of(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint, (*path, name))
            continue
        marks, many = [], False
        while get_origin(hint) in (Annotated, tuple):
            many |= get_origin(hint) is tuple
            hint, *rest = get_args(hint)
            marks += rest
        if hint in (int, float):
            yield (*path, name), hint, next((mark for mark in marks if isinstance(mark, Bound)), None), many


@pytest.mark.parametrize("kind", [Recipe, *LIBRARY])
def test_every_number_has_a_bound(kind):
    assert all(bound is not None for _, _, bound, _ in numbers(kind))


def nested(path, value):
    return {path[0]: nested(path[1:], value) if path[1:] else value}


@given(st.sampled_from(list(numbers(Recipe))), st.sampled_from(ODD) | st.integers() | st.floats())
def test_a_number_of_a_recipe_is_within_its_bound_or_one_line(number, value):
    path, kind, bound, many = number
    table = nested(path, [value] if many else value)
    fits = (isinstance(value, int) or kind is float) and abs(value) < 1e300 and bound.holds(float(value))
    if fits:
        held = build(Recipe, table, "my.toml")
        for name in path:
            held = getattr(held, name)
        assert held == ((value,) if many else value)
        return
    with pytest.raises(InputError) as caught:
        build(Recipe, table, "my.toml")
    form = (
        f"my.toml: {': '.join(path)} is .*: expected a {'whole' if kind is int else 'finite'} number( from.*| above.*)"
    )
    assert re.fullmatch(form, str(caught.value))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--train.epochs 0", "train.epochs is 0: expected a whole number from 1 to 1,000,000,000"),
        ("--start.outer.lr nan", "start.outer.lr is nan: expected a finite number above 0"),
        ("--data.held-out -5", "data.held_out is -5: expected a whole number from 0 to 1,000,000,000"),
        ("--train.clip -1", "train.clip is -1.0: expected a finite number above 0"),
        ("--model.hidden-dropout 1", "model.hidden_dropout is 1.0: expected a finite number from 0 and below 1"),
        ("--model.layers 4", "model.layers is 4: expected a whole number from 1 to 3"),
        ("--meta.estimator.record.memory 0", "meta.estimator.record.memory is 0: expected a whole number from 1"),
        ("--general.family.min-steps 1099511627776", "general.family.min_steps is 1099511627776: expected"),
        ("--general.family.min-steps 2000", "general.family.min_steps is 2000: expected at most max_steps, 1000"),
        ("--fewshot.rates 0.1 inf", "fewshot.rates is inf: expected a finite number above 0"),
        ("--fewshot.rates", "fewshot.rates is empty: name at least one"),
        ("--threads -1", "--threads is -1: expected a whole number from 0 to 1,024"),
        ("--tune.rules", "tune.rules is empty: name at least one"),
        ("--tune.rules ../../outside/rms+cache", "tune.rules is '../../outside/rms+cache': expected a method"),
        (
            "--tune.rules gated",
            "tune.rules names 'gated': choose from sgd, rms, adam, cache, METHOD+cache and METHOD+mix",
        ),
        ("--evaluate.methods static gated@", "evaluate.methods is 'gated@': expected a method"),
        ("--evaluate.methods static .rms", "evaluate.methods is '.rms': expected a method"),
        ("--start.rule ../rms", "start.rule is '../rms': expected a rule"),
        ("--evaluate.split all", "invalid choice 'all' for argument '--evaluate.split'"),
    ],
)
def test_flags_out_of_bounds_are_one_line_and_nothing_is_written(flags, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--run", "run", *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dynlm: {said}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ReadConfig(segment=-3), "ReadConfig.segment is -3: expected a whole number from 1"),
        (lambda: ReadConfig(segment=8.0), "ReadConfig.segment is 8.0: expected a whole number"),
        (lambda: ReadConfig(segment=True), "ReadConfig.segment is True: expected a whole number"),
        (lambda: ReadConfig(params="*"), "ReadConfig.params is '*': expected a list"),
        (lambda: ReadConfig(reset="often"), "ReadConfig.reset is 'often': expected one of 'article', 'never'"),
        (lambda: ReadConfig(params=("a\0",)), "expected text without NUL"),
        (lambda: GeneralConfig(betas=(0.9, 0.99)), "GeneralConfig.betas has 2 items: expected 3"),
        (lambda: GeneralConfig(betas=(0.9, 0.98, 1.0)), "GeneralConfig.betas is 1.0: expected a finite number above 0"),
        (lambda: RULES["gated"].rule.config_class(lr=-1), "GatedConfig.lr is -1: expected a finite number from 0"),
        (lambda: CacheConfig(weight=1.0), "CacheConfig.weight is 1.0: expected a finite number from 0 and below 1"),
        (lambda: CacheConfig(window=10**5000), "CacheConfig.window is a number without end: expected a whole number"),
        (lambda: TuneConfig(rules=()), "TuneConfig.rules is empty"),
        (lambda: TaskConfig(families=("rnn",)), "families names 'rnn': choose from"),
        (lambda: SGD(-1.0), "rule: sgd lr is -1.0: expected a finite number from 0"),
        (lambda: RMS(eps=math.nan), "rule: rms eps is nan: expected"),
        (lambda: Adam(beta2=1.0), "rule: adam beta2 is 1.0: expected a finite number from 0 and below 1"),
    ],
)
def test_settings_of_the_library_are_checked_when_they_are_made(make, said):
    with pytest.raises(InputError) as caught:
        make()
    assert said in str(caught.value)


def test_settings_take_what_is_equal():
    assert ReadConfig(params=["a", "b"]).params == ("a", "b")
    assert repr(CacheConfig(theta=1).theta) == "1.0"
    with pytest.raises(InputError, match=r"ReadConfig\.segment is 0"):
        dataclasses.replace(ReadConfig(), segment=0)


class Point(NamedTuple):
    x: int
    y: Annotated[float, Bound(least=0, finite=False)] = math.inf


class Table(TypedDict, total=False):
    point: Point
    names: list[str]
    sizes: dict[str, float | None]
    kind: Literal["a", 1]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "is []: expected a table"),
        ({"point": {"y": 1}}, "point: missing 1 required positional argument: 'x'"),
        ({"point": {"x": 1, "z": 1}}, "point: unknown key 'z': known are x, y"),
        ({"point": {"x": 1, "y": -1}}, "point: y is -1: expected a number from 0"),
        ({"point": {"x": 1, "y": math.nan}}, "point: y is nan: expected a number from 0"),
        ({"names": ["a", None]}, "names is None: expected text"),
        ({"sizes": {"a": "b"}}, "sizes.a is 'b': expected a finite number"),
        ({"sizes": []}, "sizes is []: expected a table"),
        ({"kind": True}, "kind is True: expected one of 'a', 1"),
        ({"kind": []}, "kind is []: expected one of 'a', 1"),
    ],
)
def test_values_of_files_are_checked_against_types(value, said):
    with pytest.raises(InputError) as caught:
        check(Table, value, "file.json")
    assert str(caught.value).startswith("file.json")
    assert said in str(caught.value)


def test_values_of_files_become_their_types():
    found = check(Table, {"point": {"x": 3}, "sizes": {"a": None, "b": 1}, "more": {}}, "file.json")
    assert found == {"point": Point(3, math.inf), "sizes": {"a": None, "b": 1.0}, "more": {}}
