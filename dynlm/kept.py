"""What is finished or half-finished stays, unless ``--overwrite`` says otherwise; ``--resume`` keeps and goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dynlm.changes import Changes
from dynlm.files import Json, read_tensors, write_json
from dynlm.runs import Run
from dynlm.settings import Bound, Settings
from dynlm.stamps import Stamp
from dynlm.types import InputError


@dataclass(frozen=True)
class Call(Settings):
    """The run directory of a command, and the flags of one call of it."""

    run: str = "runs/default"
    """the run directory: everything a command writes goes there"""
    overwrite: bool = False
    """replace what an earlier run of the same command left"""
    resume: bool = False
    """go on where the command stopped: from its checkpoint, or after what it has finished"""
    workers: Annotated[int, Bound(1, 256)] = 1
    """processes on this machine that share the work; torchrun and accelerate launch start them on several machines"""
    threads: Annotated[int, Bound(0, 1024)] = 0
    """threads to compute with; 0: one for small models, else chosen by a measurement of some 50 ms"""
    quiet: bool = False
    """results only: no progress"""
    log_with: tuple[str, ...] = ()
    """trackers that follow training: tensorboard, wandb and others that accelerate knows, each if it is installed"""
    json: bool = False
    """print one JSON object with the figures to standard output; everything else goes to standard error"""


FLAGS = tuple(f.name for f in dataclasses.fields(Call) if f.name != "run")
"""settings of one call: never of a recipe, and not kept in a run's recipe.json"""


def saved_settings(call: Call) -> dict[str, Any]:
    """Return what a run keeps of a recipe: all but the flags of the call."""
    return {name: value for name, value in dataclasses.asdict(call).items() if name not in FLAGS}


def free(path: Path, call: Call, checkpoint: Path | None = None) -> None:
    """Refuse to replace a result, or unfinished work, unasked.

    Raises:
        InputError: with the flag that the user may mean.
    """
    if call.overwrite and not call.resume:
        return
    if checkpoint is not None and call.resume:
        if call.overwrite:
            raise InputError("--resume goes on with unfinished work, --overwrite starts again: give one of the two")
        if checkpoint.exists():
            return
        if path.exists():
            raise InputError(f"{path} exists and nothing is left to resume: add --overwrite instead to make it again")
        raise InputError(f"{checkpoint} does not exist: there is no unfinished work to resume, leave --resume out")
    if checkpoint is not None and checkpoint.exists():
        raise InputError(f"{checkpoint} holds unfinished work: add --resume to go on, or --overwrite to start again")
    if path.exists() and not call.resume:
        raise InputError(f"{path} exists: add --overwrite to replace it, or choose another --run")


def free_parts(path: Path, parts: Path, call: Call) -> None:
    """As :func:`free`, for a stage that keeps what it has finished in ``parts`` until all of it is.

    Raises:
        InputError: with the flag that the user may mean.
    """
    if call.overwrite or call.resume:
        return
    if parts.exists():
        raise InputError(f"{parts} holds unfinished work: add --resume to go on, or --overwrite to start again")
    if path.exists():
        raise InputError(f"{path} exists: add --overwrite to replace it, or --resume to keep what is finished")


def made_alike(path: Path, settings: Mapping[str, object], call: Call) -> bool:
    """Whether ``--resume`` keeps the finished file ``path``: it is there, and says that it was made with ``settings``.

    Raises:
        InputError: it was made with other settings, and ``--overwrite`` does not allow to replace it.
    """
    if not call.resume or not path.exists():
        return False
    made = told(path)
    other = next((name for name, value in settings.items() if made.get(name) != value), None)
    if other is not None and not call.overwrite:
        raise InputError(
            f"{path} was made with another {other}: add --overwrite to replace it, or choose another --run"
        )
    return other is None


def told(path: Path) -> Json:
    """Return what a rule, cache or start says of how it was made."""
    made = read_tensors(path)[1]
    inner = made.get("made", made)
    return inner if isinstance(inner, dict) else {}


def is_finished(path: Path) -> bool:
    """Return whether a rule that can be read is there, and says of itself no other than that it is finished."""
    try:
        return path.exists() and told(path).get("finished", True) is True
    except InputError:
        return False


def mark(new: Changes, run: Run, call: Call) -> None:
    """Make a folder without recipe.json a run, though it has no base model yet."""
    if not run.recipe.exists():
        write_json(new.at(run.recipe), Stamp().put_on(saved_settings(call)))
