"""Several files of a run directory change as one: all of them, or none, whenever the process is killed.

New files are written to a folder of their own first. One rename of that folder decides; then the files move to their
places. A command that is killed before the rename has changed nothing. After it, the next command carries on.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynlm.files import let_read, read_json, sync, sync_one, write_json, writing
from dynlm.processes import is_main, turn
from dynlm.types import InputError

NEXT, COMMIT = ".next.", ".commit"
LIST = "changes.json"


class Changes:
    """Collects what is to change in the run directory ``run``."""

    def __init__(self, run: Path, scratch: Path) -> None:
        self.run, self.scratch = run, scratch
        self.placed: list[str] = []
        self.removed: list[str] = []

    def at(self, path: Path) -> Path:
        """Return where to write the file or folder that is to stand at ``path`` of the run directory."""
        name = path.relative_to(self.run).as_posix()
        target = self.scratch / "new" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in self.placed:
            self.placed.append(name)
        return target

    def coming(self, path: Path) -> Path:
        """Return where to read what will stand at ``path``: as it was written here, or as it is."""
        new = self.scratch / "new" / path.relative_to(self.run)
        return new if new.exists() else path

    def remove(self, *paths: Path) -> None:
        """Remove files and whole folders, where they are there; what takes their place stays."""
        self.removed += [path.relative_to(self.run).as_posix() for path in paths]

    def decide(self) -> None:
        """From here on the changes will be made, by this command or by the next one."""
        removed = [name for name in self.removed if name not in self.placed]
        write_json(self.scratch / LIST, {"remove": removed, "place": self.placed})
        if (self.scratch / "new").exists():
            let_read(self.scratch / "new")
        sync(self.scratch)
        os.rename(self.scratch, self.run / COMMIT)
        sync_one(self.run)


@contextmanager
def changing(run: Path) -> Iterator[Changes]:
    """Collect changes of the run directory ``run``; they are made when the block ends without an error.

    Only the process that has claimed the directory may do this (dynlm.claim). Those that share its command come here
    too; what they collect is dropped.
    """
    with turn():
        if is_main():
            with _deciding(run) as changes:
                yield changes
        else:
            with tempfile.TemporaryDirectory(prefix="dynlm.") as scratch:
                yield Changes(run, Path(scratch))


@contextmanager
def _deciding(run: Path) -> Iterator[Changes]:
    try:
        run.mkdir(parents=True, exist_ok=True)
        complete(run)
        scratch = Path(tempfile.mkdtemp(prefix=NEXT, dir=run))
    except OSError as error:
        raise InputError(f"cannot write {run}: {error.strerror}; choose another run directory") from error
    try:
        changes = Changes(run, scratch)
        with writing(run):
            yield changes
            changes.decide()
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    complete(run)


def complete(run: Path) -> None:
    """Make the changes that were decided on, if there are any. May be stopped and called again."""
    commit = run / COMMIT
    if not commit.is_dir():
        return
    if (commit / LIST).is_file():
        changes = read_json(commit / LIST)
        for name in changes["remove"]:
            _remove(_inside(run, name))
        for number, name in enumerate(changes["place"]):
            new, old = commit / "new" / name, _inside(run, name)
            if new.exists():
                old.parent.mkdir(parents=True, exist_ok=True)
                if old.is_dir():
                    os.rename(old, commit / f"old.{number}")
                os.replace(new, old)
        (commit / LIST).unlink()
    shutil.rmtree(commit)


def _inside(run: Path, name: str) -> Path:
    """A path within the run directory. The list may be a stranger's, and name others, by ``..`` or through links."""
    path = run / name
    if ".." in path.parts or not path.parent.resolve().is_relative_to(run.resolve()):
        raise InputError(f"{run / COMMIT / LIST} names {name!r}, which is outside of {run}: remove {run / COMMIT}")
    return path


def _remove(path: Path) -> None:
    """Remove a file, or a folder, and the folder that held it if that is empty now."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()
