"""The files that ``dynlm read`` and ``dynlm report RUN RUN`` are asked to write: looked at before anything is read,
replaced whole, never foreign.

A link is followed and stays a link. A file that is there keeps its mode, and is replaced only if it is empty, or dynlm
wrote it as the same kind of file, or ``--overwrite`` says so.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dynlm.files import replacing
from dynlm.session.memory import KIND
from dynlm.types import InputError

PAGE = b'<meta name="generator" content="dynlm read">'
REPORT = b'<meta name="generator" content="dynlm report">'
HEAD = 4096
"""bytes of a file among which its marker is"""


class Target:
    """One file to write. Constructing it raises :class:`InputError` where that could not end well."""

    def __init__(self, name: str, inputs: Sequence[str], ours: Callable[[Path], bool], overwrite: bool) -> None:
        """``ours`` says whether a file was written by dynlm for the same purpose; ``inputs`` are never written to."""
        self.name, self.path = name, Path(os.path.realpath(name))
        try:
            self._look(inputs, ours, overwrite)
            Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent)).rmdir()
        except OSError as error:
            raise InputError(f"cannot write {name} ({error.strerror}): give a file in another folder") from None

    def _look(self, inputs: Sequence[str], ours: Callable[[Path], bool], overwrite: bool) -> None:
        if not self.path.parent.is_dir():
            raise InputError(f"cannot write {self.name}: give a file in an existing folder")
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"cannot write {self.name}: it is {_kind(status.st_mode)}; give the name of a file")
        for name in inputs:
            if os.path.exists(name) and os.path.samefile(name, self.path):
                raise InputError(f"cannot write {self.name}: it is read ({name}); choose another name")
        if not os.access(self.path, os.W_OK):
            raise InputError(f"cannot write {self.name}: it is read-only; choose another name")
        if status.st_size and not overwrite and not ours(self.path):
            message = f"{self.name} exists and was not written by dynlm: choose another name, or overwrite it"
            raise InputError(message, setting="overwrite")

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A temporary name, which takes the place of the file when the block ends without an error."""
        with replacing(self.path) as temporary:
            yield temporary
            if self.path.is_file():
                shutil.copymode(self.path, temporary)

    def megabytes(self) -> str:
        """Return the size of what was written."""
        return f"{self.path.stat().st_size / 1e6:.1f} MB"


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a loop of links", stat.S_IFIFO: "a pipe"}
    return kinds.get(stat.S_IFMT(mode), "no regular file")


class Targets(NamedTuple):
    """The files to write."""

    page: Target | None
    memory: Target | None


def find_targets(page: str, memory: str, inputs: Sequence[str], loaded: str, overwrite: bool) -> Targets:
    """Return what is to be written, tried before hours of reading; the page must not replace the memory ``loaded``.

    Raises:
        InputError: a file that cannot be written, one that is read or not dynlm's, one file for both.
    """
    found = Targets(
        Target(page, [*inputs, loaded], is_page, overwrite) if page else None,
        Target(memory, inputs, is_memory, overwrite) if memory else None,
    )
    require_apart([target for target in found if target])
    return found


def require_apart(targets: Sequence[Target]) -> None:
    """Refuse two targets that are one file."""
    for i, target in enumerate(targets):
        for other in targets[:i]:
            if target.path == other.path:
                raise InputError(f"{other.name} and {target.name} are one file: give two names")


def is_page(path: Path) -> bool:
    """Return whether a file is a page of ``dynlm read``."""
    head = _head(path)
    return head.startswith(b"<!DOCTYPE html>") and PAGE in head


def is_report(path: Path) -> bool:
    """Return whether a file is a page of ``dynlm report RUN RUN``."""
    head = _head(path)
    return head.startswith(b"<!DOCTYPE html>") and REPORT in head


def is_memory(path: Path) -> bool:
    """Return whether a file is a memory: safetensors, whose header follows its length, with that kind."""
    head = _head(path)
    return head.startswith(b'{"__metadata__"', 8) and KIND.encode() in head


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)
