"""Compiled libraries on disk, loaded only where nobody else can have written them.

Two checks come before a library is loaded, because loading runs code. **Owner and mode are the security**: the folder
and the file belong to this user or to root, neither is a link, and nobody else may write to them. **The checksum is the
integrity check**: it is part of the file's name, and finds what was cut short or damaged. It keeps out no attacker, as
whoever can write the file can also name it. A library that fails a check is built again; where the folder itself is not
to be trusted or cannot be written, libraries are built in a private temporary folder for this process alone.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import secrets
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDER_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
FILE_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe must not block


@functools.cache
def note(text: str) -> None:
    """Tell the user something once in a process; ``logging.getLogger("dynlm")`` silences or redirects it."""
    logging.getLogger("dynlm").warning("dynlm: note: %s", text)


def library(identity: str, make: Callable[[], bytes]) -> ctypes.CDLL:
    """Return the library of this identity, from the cache folder or from ``make``, whose result is kept there.

    Raises:
        OSError: what ``make`` gave is no library that this process can load.
    """
    name = f"kernel-{hashlib.sha256(identity.encode()).hexdigest()[:32]}"
    with cache_folder() as folder:
        if folder is not None:
            for file in _files_of(name, folder):
                if _is_sound(file, folder):
                    with suppress(OSError):
                        return _load(file, folder)
                with suppress(OSError):
                    os.unlink(file, dir_fd=folder)
        content = make()
        if not _is_whole(content):
            raise OSError("the compiler wrote no whole library")
        file = f"{name}-{hashlib.sha256(content).hexdigest()}.so"
        problem = None
        if folder is not None:
            try:
                _write(content, file, folder)
                return _load(file, folder)
            except OSError as error:  # no space left, or a place from which no code may run
                problem = error
                with suppress(OSError):
                    os.unlink(file, dir_fd=folder)
    # a mapped library lives on when its file is gone
    with tempfile.TemporaryDirectory(prefix="dynlm-kernel-") as private, _opened(Path(private)) as folder:
        _write(content, file, folder)
        loaded = _load(file, folder, Path(private))
    if problem is not None:
        reason = problem.strerror or problem
        note(f"cannot keep compiled kernels in {_path()} ({reason}): each command builds them again")
    return loaded


@contextmanager
def cache_folder() -> Iterator[int | None]:
    """A descriptor of the cache folder, made where it is missing; None, and a note, where it cannot be trusted.

    Everything inside is reached through the descriptor, so that exchanging the path changes nothing afterwards.
    """
    path = _path()
    if path is None:
        note("there is no home folder for compiled kernels: each command builds them again; set XDG_CACHE_HOME")
        yield None
        return
    try:
        _make(path)
        descriptor = os.open(path, FOLDER_FLAGS)
    except OSError as error:
        note(f"cannot use {path} for compiled kernels ({error.strerror}): each command builds them again")
        yield None
        return
    try:
        if _is_ours(os.fstat(descriptor)):
            yield descriptor
        else:
            note(
                f"{path} belongs to another user, or others can write to it: nothing is loaded from it, and each "
                "command builds its kernels again; make the folder yours alone (chmod 700), or set XDG_CACHE_HOME"
            )
            yield None
    finally:
        os.close(descriptor)


def _path() -> Path | None:
    """``$XDG_CACHE_HOME/dynlm`` or ``~/.cache/dynlm``. A relative path is ignored, as the XDG specification asks."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # no $HOME, and a user without an entry in the password file
            return None
    return base / "dynlm" if base.is_absolute() else None


def _make(path: Path) -> None:
    """The folder and its missing parents, for this user alone whatever the umask is."""
    for folder in [*reversed(path.parents), path]:
        if not folder.exists():
            with suppress(FileExistsError):  # another process was faster
                folder.mkdir(0o700)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, FOLDER_FLAGS)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _files_of(name: str, folder: int) -> list[str]:
    return sorted(file for file in os.listdir(folder) if file.startswith(f"{name}-"))


def _is_sound(file: str, folder: int) -> bool:
    """Return whether a regular file of ours has the content that its name promises."""
    try:
        with open(os.open(file, FILE_FLAGS, dir_fd=folder), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode) or not _is_ours(status):
                return False
            content = stream.read()
    except OSError:
        return False
    return file.endswith(f"-{hashlib.sha256(content).hexdigest()}.so") and _is_whole(content)


def _is_whole(content: bytes) -> bool:
    """Whether an ELF library has all that its header announces: loading one that is cut short ends the process."""
    if content[:4] != b"\x7fELF" or content[4:5] != b"\x02":
        return len(content) > 0  # of another system, which checks by itself
    if len(content) < 64:
        return False
    end, size, count = *struct.unpack_from("<Q", content, 40), *struct.unpack_from("<HH", content, 58)
    return bool(end + size * count <= len(content))


def _write(content: bytes, file: str, folder: int) -> None:
    """Under a temporary name, then renamed: whoever reads sees all of it or nothing."""
    temporary = f".{secrets.token_hex(8)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
    try:
        with open(descriptor, "wb") as stream:
            os.fchmod(descriptor, 0o600)
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
        os.replace(temporary, file, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def _load(file: str, folder: int, path: Path | None = None) -> ctypes.CDLL:
    """Through the descriptor where the system allows it: the folder that was checked, not the one of its name now."""
    checked = f"/proc/self/fd/{folder}/{file}"
    return ctypes.CDLL(checked if os.path.exists(checked) else str((path or _path() or Path()) / file))
