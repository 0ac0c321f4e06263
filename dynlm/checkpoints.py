"""Checkpoints of unfinished work: the optimizer's state, where the work stands, and the log of its steps so far."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import torch

from dynlm.files import Json, write_text
from dynlm.settings import Whole, as_json, build, check
from dynlm.types import InputError


class LogLine(TypedDict):
    """A line of a log; it holds more."""

    step: int


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the state of an optimizer for a checkpoint: ``optimizer.PARAMETER.NAME``."""
    slots = optimizer.state_dict()["state"].items()
    return {f"optimizer.{index}.{name}": value for index, of_one in slots for name, value in of_one.items()}


def optimizer_layout(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold of an optimizer of Adam's family: of every parameter the same, or nothing at all."""
    if not any(key.startswith("optimizer.") for key in tensors):
        return {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [f"optimizer.{index}" for index in range(len(parameters))]
    if "optimizer.step" in tensors:  # of the only parameter, as earlier versions wrote it
        names = ["optimizer"]
    layout: dict[str, torch.Tensor] = {}
    for name, p in zip(names, parameters, strict=True):
        layout |= {f"{name}.exp_avg": p, f"{name}.exp_avg_sq": p, f"{name}.step": torch.zeros(())}
    return layout


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """The counterpart of :func:`optimizer_tensors`; ``optimizer.NAME`` is of the only parameter."""
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key in (k for k in tensors if k.startswith("optimizer.")):
        _, *index, name = key.split(".")
        slots.setdefault(int(index[0]) if index else 0, {})[name] = tensors[key]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


@contextmanager
def resuming(meta: Json, config: Any, table: str, owner: str = "run", model: str = "") -> Iterator[None]:
    """Inside, a checkpoint is taken over: that it has other settings, or does not fit, is one clear line.

    ``model``: fingerprint of the base model that the work belongs to, where there is one.
    """
    if meta.get("config") != as_json(config):
        raise InputError(
            f"the checkpoint was made with other [{table}] settings: resume with those, or start again",
            setting="overwrite",
        )
    if meta.get("model", "") != model:
        raise InputError(
            f"the checkpoint belongs to the base model {meta.get('model')}, this run holds {model}: start again",
            setting="overwrite",
        )
    with fitting(owner):
        yield


@contextmanager
def fitting(owner: str = "run") -> Iterator[None]:
    """Inside, what a checkpoint holds is used for the first time: that it does not fit is one clear line."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"the checkpoint does not fit this {owner} ({reason}): start again", setting="overwrite"
        ) from None


Position = TypeVar("Position")


def progress_of(kind: type[Position], meta: Json, steps: int) -> Position:
    """Return where the work of a checkpoint stands.

    Raises:
        InputError: no such record, or one of more than ``steps`` steps.
    """
    progress: Any = build(kind, meta.get("progress"), "progress")
    step_of({"step": progress.step}, steps)
    found: Position = progress
    return found


def step_of(meta: Json, steps: int) -> int:
    """Return the step of a checkpoint, of ``steps``."""
    step: int = check(Whole, meta.get("step"), "step")
    if step > steps:
        raise InputError(f"it is at step {step:,} of {steps:,}")
    return step


def log_of(meta: Json) -> list[Json]:
    """Return the records of a checkpoint's log, each of a step."""
    return cast(list[Json], check(list[LogLine], meta.get("log"), "log"))


def write_log(path: Path, records: Sequence[Json]) -> None:
    """One JSON line a step: what a stage did.

    A checkpoint keeps the same records, so that no step is lost or logged twice.
    """
    write_text(path, "".join(f"{json.dumps(record)}\n" for record in records))
