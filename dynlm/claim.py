"""A command claims its run directory: dynlm made it or it is empty, and no other dynlm works in it at the same time."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dynlm.changes import COMMIT, LIST, NEXT, complete
from dynlm.files import PROBE
from dynlm.processes import is_main
from dynlm.runs import Run
from dynlm.stamps import read_stamped
from dynlm.types import InputError

LOCK = ".lock"
PATIENCE = 1.0
"""seconds to wait for a lock: the workers of a killed process end a moment after it"""
TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")
"""names of folders that dynlm.files.replacing and dynlm.changes make"""
INSIDE = re.compile(rf"{re.escape(PROBE)}.*|\.tmp\w{{6}}")
"""what may be half made in them: a tried file mode, and the file that safetensors renames when it is whole"""


@contextmanager
def claim(run: Run, *, begins: bool = False, writes: bool = True) -> Iterator[None]:
    """Inside, this process, and those that share its command, alone work in ``run``. First, what a killed
    command left behind is completed or removed.

    ``begins``: the command makes the run where there is none. ``writes``: False for a command that can do without
    writing, which goes on in a directory that it may not write to.

    Raises:
        InputError: files that are not dynlm's, another process that works there, a directory that cannot be written.
    """
    if not is_main() or not (begins or run.recipe.is_file() or _decided(run.path)):
        yield
        return
    require_ours(run)
    if not writes and not os.access(run.path, os.W_OK):
        yield
        return
    made = _make(run.path)
    try:
        with _lock(run.path):
            for folder in (run.path, run.retraining.path):
                complete(folder)
            _remove_temporary(run.path)
            yield
    finally:
        for folder in made:  # where nothing was written, nothing is left
            with suppress(OSError):
                folder.rmdir()


def recover(run: Run) -> None:
    """Complete what a killed command has decided on, so that the run can be read."""
    if _decided(run.path):
        with claim(run):
            pass


def require_ours(run: Run) -> None:
    """Refuse a directory that holds files but is no run of dynlm.

    Raises:
        InputError: with the first of these files.
    """
    if run.path.exists() and not run.path.is_dir():
        raise InputError(f"--run {run.path} is a file: give the name of a directory")
    if run.recipe.is_file():
        read_stamped(run.recipe)
        return
    if not run.path.is_dir() or _decided(run.path):
        return
    try:
        names = sorted(os.listdir(run.path))
    except OSError as error:
        raise InputError(f"cannot read {run.path}: {error.strerror}; choose another run directory") from None
    own = (LOCK, run.trackers.name)  # a tracker writes before there is anything else
    foreign = [name for name in names if name not in own and not name.startswith((NEXT, COMMIT))]
    if foreign:
        raise InputError(
            f"{run.path} is no run of dynlm and holds other files ({foreign[0]!r}): choose another --run, or empty it"
        )


def _decided(path: Path) -> bool:
    return (path / COMMIT / LIST).is_file()


def _make(path: Path) -> list[Path]:
    """Make a folder; returns what was made, innermost first."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another run directory") from None
    return made


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    path = folder / LOCK
    try:
        descriptor = _take(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another run directory") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is gone, and makes another
        os.close(descriptor)


def _take(path: Path) -> int:
    """Return an open file that holds the lock until it is closed, or until the process ends in whatever way."""
    until = time.monotonic() + PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "not known"
            os.close(descriptor)
            if time.monotonic() > until:
                raise InputError(
                    f"another dynlm works in {path.parent} (process {owner}): wait for it, or choose another --run"
                ) from None
            time.sleep(0.05)
            continue
        except OSError:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                return descriptor
        os.close(descriptor)  # its owner has just removed it


def _remove_temporary(path: Path) -> None:
    """Remove the folders in which killed commands were writing; nobody else writes while the lock is held."""
    for folder in list(path.rglob(".*")):
        name = TEMPORARY.fullmatch(folder.name)
        if name and name[1] == NEXT.strip("."):
            shutil.rmtree(folder, ignore_errors=True)
        if not name or folder.is_symlink() or not folder.is_dir():
            continue
        target, held = folder.with_name(name[1]), {n for n in os.listdir(folder) if not INSIDE.fullmatch(n)}
        if not held <= {name[1], "old"}:
            continue  # not dynlm's
        if "old" in held and not target.exists():
            os.rename(folder / "old", target)
        shutil.rmtree(folder, ignore_errors=True)
