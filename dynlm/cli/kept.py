"""What is finished or half-finished stays, unless ``--overwrite`` says otherwise; ``--resume`` keeps and goes on."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path

from dynlm.changes import Changes
from dynlm.cli.recipe import Recipe, saved_settings
from dynlm.runs import Json, Run, read_tensors, write_json
from dynlm.stamps import Stamp
from dynlm.types import InputError


def free(path: Path, recipe: Recipe, checkpoint: Path | None = None) -> None:
    """Refuse to replace a result, or unfinished work, unasked.

    Raises:
        InputError: with the flag that the user may mean.
    """
    if recipe.overwrite and not recipe.resume:
        return
    if checkpoint is not None and recipe.resume:
        if recipe.overwrite:
            raise InputError("--resume goes on with unfinished work, --overwrite starts again: give one of the two")
        if checkpoint.exists():
            return
        if path.exists():
            raise InputError(f"{path} exists and nothing is left to resume: add --overwrite instead to make it again")
        raise InputError(f"{checkpoint} does not exist: there is no unfinished work to resume, leave --resume out")
    if checkpoint is not None and checkpoint.exists():
        raise InputError(f"{checkpoint} holds unfinished work: add --resume to go on, or --overwrite to start again")
    if path.exists() and not recipe.resume:
        raise InputError(f"{path} exists: add --overwrite to replace it, or choose another --run")


def free_parts(path: Path, parts: Path, recipe: Recipe) -> None:
    """As :func:`free`, for a stage that keeps what it has finished in ``parts`` until all of it is.

    Raises:
        InputError: with the flag that the user may mean.
    """
    if recipe.overwrite or recipe.resume:
        return
    if parts.exists():
        raise InputError(f"{parts} holds unfinished work: add --resume to go on, or --overwrite to start again")
    if path.exists():
        raise InputError(f"{path} exists: add --overwrite to replace it, or --resume to keep what is finished")


def made_alike(path: Path, settings: Mapping[str, object], recipe: Recipe) -> bool:
    """Whether ``--resume`` keeps the finished file ``path``: it is there, and says that it was made with ``settings``.

    Raises:
        InputError: it was made with other settings, and ``--overwrite`` does not allow to replace it.
    """
    if not recipe.resume or not path.exists():
        return False
    made = told(path)
    other = next((name for name, value in settings.items() if made.get(name) != value), None)
    if other is not None and not recipe.overwrite:
        raise InputError(
            f"{path} was made with another {other}: add --overwrite to replace it, or choose another --run"
        )
    return other is None


def told(path: Path) -> Json:
    """What a rule, cache or start says of how it was made."""
    made = read_tensors(path)[1]
    inner = made.get("made", made)
    return inner if isinstance(inner, dict) else {}


def is_finished(path: Path) -> bool:
    """Whether a rule that can be read is there, and says of itself no other than that it is finished."""
    try:
        return path.exists() and told(path).get("finished", True) is True
    except InputError:
        return False


def mark(new: Changes, run: Run, recipe: Recipe) -> None:
    """Make a folder without recipe.json a run, though it has no base model yet."""
    if not run.recipe.exists():
        write_json(new.at(run.recipe), Stamp().put_on(saved_settings(recipe)))


def require_apart(recipe: Recipe, run: Run) -> None:
    """Refuse a corpus, tokenizer or model that lies where the run's own files are written and replaced.

    Raises:
        InputError: with the setting that names it.
    """
    names = {
        "data.source": os.path.expandvars(recipe.data.source).removeprefix("hf:"),
        "tokenizer.name": recipe.tokenizer.name,
        "model.pretrained": recipe.model.pretrained,
    }
    folder = run.path.resolve()
    for setting, name in names.items():
        for path in map(Path, glob.glob(name, recursive=True) if name else ()):
            if path.resolve().is_relative_to(folder):
                raise InputError(
                    f"{setting} is {name!r}, which lies in the run directory {run.path}, where files are replaced: "
                    f"copy it to another place, or choose another --run"
                )
