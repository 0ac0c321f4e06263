"""Trackers of training (TensorBoard, Weights & Biases and others): those of accelerate, each optional, or your own.

A stage logs its figures by name and step. Where no tracker is asked for, nothing is imported and nothing happens.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from dynlm.lazy import optional
from dynlm.types import InputError

PROJECT = "dynlm"
Track = Callable[[Mapping[str, float], int], None]
"""takes figures by name, and the step that they belong to"""


class Tracker(Protocol):
    """What follows training: ``accelerate.tracking.GeneralTracker`` has these methods, and your own may."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Take the settings, by dotted names."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take figures of a step, by STAGE/NAME."""

    def finish(self) -> None:
        """Nothing more will come."""


def untracked(figures: Mapping[str, float], step: int) -> None:
    """Log nothing."""


@contextmanager
def tracking(
    trackers: Sequence[str | Tracker], stage: str, folder: Path, settings: Mapping[str, Any]
) -> Iterator[Track]:
    """Inside, every tracker gets the figures of ``stage`` as STAGE/NAME; first it gets the settings.

    Args:
        trackers: by the names that accelerate knows, or themselves.
        stage: what is trained.
        folder: where trackers write that write files.
        settings: of the stage; tables may be nested.

    Raises:
        InputError: a name that accelerate does not know, or a tracker that is not installed; none has started.
    """
    if not trackers:
        yield untracked
        return
    made = [_made(tracker, folder) if isinstance(tracker, str) else tracker for tracker in trackers]
    with ExitStack() as stack:
        for tracker in made:
            start = getattr(tracker, "start", None)  # of accelerate's newer releases
            if start is not None:
                start()
            stack.callback(tracker.finish)
            tracker.store_init_configuration(flat(settings))

        def track(figures: Mapping[str, float], step: int) -> None:
            for tracker in made:
                tracker.log({f"{stage}/{name}": value for name, value in figures.items()}, step=step)

        yield track


def _made(name: str, folder: Path) -> Tracker:
    """Return a tracker of accelerate by its name."""
    with optional(f"tracker {name!r}"):
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        from accelerate.utils import LoggerType

    if name not in LOGGER_TYPE_TO_CLASS:
        close = difflib.get_close_matches(name, LOGGER_TYPE_TO_CLASS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(LOGGER_TYPE_TO_CLASS)}"
        raise InputError(f"unknown tracker {name!r}: {hint}")
    if name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
        raise InputError(f"tracker {name!r} is not installed: pip install {name.replace('_', '-')}, or leave it out")
    kind = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        folder.mkdir(parents=True, exist_ok=True)
        return kind(PROJECT, logging_dir=folder)  # type: ignore[no-any-return]  # accelerate ships no types
    return kind(PROJECT)  # type: ignore[no-any-return]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str | float | bool]:
    """Return settings by dotted name, as trackers take them: numbers and truth values as they are, the rest as text."""
    found: dict[str, str | float | bool] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, str | int | float) else str(value)
    return found
