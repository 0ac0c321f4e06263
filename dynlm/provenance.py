"""What made the files of a run: date, command, settings, seeds, code, versions and machine, in RUN/provenance.json.

Each entry names its file and keeps the fingerprint of what was written: a file that was replaced since by other means
is not told of.
"""

from __future__ import annotations

import functools
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from dynlm.changes import Changes
from dynlm.files import Json, read_json, write_json
from dynlm.kept import Call, saved_settings
from dynlm.runs import Run
from dynlm.settings import check
from dynlm.stamps import fingerprint_files
from dynlm.types import InputError

SCHEMA = 1
UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve")
"""vector and matrix units of a processor that matter for speed"""


class Hardware(TypedDict):
    """The machine."""

    processor: str
    units: list[str]
    cores: int
    gpu: str | None


class Origin(TypedDict):
    """How one file, or one folder, came to be."""

    fingerprint: str
    """of what was written (dynlm.stamps)"""
    date: str
    """when it was written, in UTC, as ISO 8601 has it"""
    command: str
    seconds: NotRequired[float]
    """from the start of the command until then; what a command before ``--resume`` took is not in it"""
    settings: dict[str, Any]
    """those that differ from the defaults"""
    seeds: dict[str, int]
    threads: int
    commit: str | None
    """of dynlm's own git checkout, ``+changes`` behind it where files differ; None for an installed package"""
    versions: dict[str, str]
    hardware: Hardware


@dataclass(frozen=True)
class _Command:
    """What is being done, as far as a file's origin needs it."""

    line: str
    settings: Json = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    started: float | None = None


_current: ContextVar[_Command | None] = ContextVar("command", default=None)


@contextmanager
def command(line: str, call: Call) -> Iterator[None]:
    """Inside, whatever :func:`record` tells of was made by the command ``line`` with the settings ``call``."""
    ours, usual = (dict(_flat(saved_settings(settings))) for settings in (call, type(call)()))
    changed = {name: value for name, value in ours.items() if value != usual.get(name)}
    seeds = {name: value for name, value in ours.items() if name.rpartition(".")[2] == "seed"}
    token = _current.set(_Command(line, changed, seeds, time.perf_counter()))
    try:
        yield
    finally:
        _current.reset(token)


def record(new: Changes, run: Run, *paths: Path) -> None:
    """Tell, with the other changes of a run, what made the files or folders ``paths`` among them."""
    kept: dict[str, Origin] = {}
    with suppress(InputError):  # hours of work are not lost to a damaged record of earlier work
        kept = _read(new.coming(run.provenance))
    kept = {name: origin for name, origin in kept.items() if new.coming(run.path / name).exists()}
    for path in paths:
        kept[path.relative_to(run.path).as_posix()] = _origin(fingerprint_files(new.coming(path)))
    write_json(new.at(run.provenance), {"schema": SCHEMA, "files": dict(sorted(kept.items()))})


def load(run: Run) -> dict[str, Origin]:
    """Return the origins of the run's files by path, of those that are as they were written.

    Raises:
        InputError: a file that dynlm did not write.
    """
    origins = _read(run.provenance)
    inside = {
        name: run.path / name for name in origins if ".." not in Path(name).parts and not Path(name).is_absolute()
    }
    held = {name: fingerprint_files(path) for name, path in inside.items() if path.exists()}
    return {name: origins[name] for name, found in held.items() if found == origins[name]["fingerprint"]}


def _read(path: Path) -> dict[str, Origin]:
    if not path.is_file():
        return {}
    values = read_json(path)
    if values.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {values.get('schema')!r}, this version reads {SCHEMA}: remove it")
    origins: dict[str, Origin] = check(dict[str, Origin], values.get("files"), f"{path}: files")
    return origins


def _origin(fingerprint: str) -> Origin:
    now = _current.get() or _Command(
        shlex.join(Path(part).name if not i else part for i, part in enumerate(sys.orig_argv))
    )
    origin: Origin = {
        "fingerprint": fingerprint,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": now.line,
        "settings": now.settings,
        "seeds": now.seeds,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "versions": versions(),
        "hardware": {
            "processor": processor(),
            "units": units(),
            "cores": os.cpu_count() or 1,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }
    if now.started is not None:
        origin["seconds"] = round(time.perf_counter() - now.started, 1)
    return origin


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``("table.name", value)`` of nested settings."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    found = {"python": platform.python_version()}
    for name in ("dynlm", "torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@functools.cache
def _commit() -> str | None:
    """Return the commit of the git checkout that dynlm is imported from, if it is one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+changes" if changes.strip() else "")


def processor() -> str:
    """Return the processor's name."""
    return _processor_line("model name") or platform.processor() or platform.machine()


def units() -> list[str]:
    """Return those of its vector and matrix units that matter for speed, as far as the system tells."""
    flags = (_processor_line("flags") or _processor_line("Features")).split()
    return [name for name in UNITS if name in flags]


@functools.cache
def _processor_line(key: str) -> str:
    """Return what Linux says of the first processor under ``key``; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
