"""The one door to disk: whole files or none, and files that hold what they should.

Every write goes to a temporary name beside its target, reaches the disk, and is renamed, so that an interrupted command
or a power cut leaves the earlier file whole. Tensors are safetensors, everything else JSON; nothing is pickled. What is
read is checked: a damaged or foreign file is one line with its path and the true reason.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dynlm.settings import shown
from dynlm.types import InputError

Json = dict[str, Any]
SCHEMA = 1
"""of what the files of tensors say of themselves"""
PROBE = ".mode."
"""begins the name of a folder in which the mode of new files is tried"""


@contextmanager
def replacing(path: Path, needs: int = 0) -> Iterator[Path]:
    """A temporary sibling of ``path`` that takes its place when the block ends without an error.

    Works for files and for directories; a directory is swapped in after the old one has moved aside. ``needs`` are the
    bytes that will be written, for the error.

    Raises:
        InputError: what cannot be written, as on a full disk; ``path`` is what it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another run directory") from error
    try:
        with writing(path, needs):
            target = scratch / path.name
            yield target
            sync(target)
            if path.is_dir():
                os.rename(path, scratch / "old")
            os.replace(target, path)
            sync_one(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def writing(path: Path, needs: int = 0) -> Iterator[None]:
    """Inside, ``path`` is written: what the system refuses, as on a full disk, is one line with the path and the sizes.

    safetensors has an error of its own for it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = f"{shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free there"
        sizes = f"{needs / 1e6:,.1f} MB are needed, {free}" if needs else free
        raise InputError(f"cannot write {path} ({_reason(error)}; {sizes}): nothing was replaced") from error


def _reason(error: Exception) -> str:
    """Return what went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def sync(path: Path) -> None:
    """Have the system write a file, or all of a folder, to the disk, so that no rename is there before it."""
    for one in [path, *path.rglob("*")]:
        sync_one(one)


def sync_one(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what some file systems say of folders
            raise
    finally:
        os.close(descriptor)


def let_read(path: Path) -> None:
    """Give files the mode of any new file: safetensors writes its own for the owner alone."""
    with tempfile.TemporaryDirectory(prefix=PROBE, dir=path.parent) as folder:
        (Path(folder) / "new").touch()
        mode = stat.S_IMODE((Path(folder) / "new").stat().st_mode)
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            file.chmod(mode)


def write_text(path: Path, text: str) -> None:
    content = text.encode("utf-8")
    with replacing(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Strict JSON: a NaN or infinity is an error here, not in the reader's parser."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], meta: Json | None = None) -> None:
    """Tensors and a JSON-valued ``meta`` in one safetensors file."""
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path, sum(tensor.nbytes for tensor in contiguous.values())) as temporary:
        save_file(contiguous, temporary, metadata={"meta": json.dumps({"schema": SCHEMA, **(meta or {})})})
        let_read(temporary)


def why_unreadable(path: str | Path) -> str | None:
    """The true reason why nothing can be read at ``path``, as the end of a sentence; None where something can.

    Pipes can be read, as ``<(zcat x)`` and /dev/stdin, and so can terminals and /dev/null, which is empty.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "is a broken link" if os.path.islink(path) else "does not exist"
    except OSError as error:
        return "is a loop of links" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
    except ValueError:
        return "is no name of a file"
    kinds = {stat.S_IFDIR: "is a folder", stat.S_IFSOCK: "is a socket", stat.S_IFBLK: "is a device of blocks"}
    if stat.S_IFMT(status.st_mode) in kinds:
        return kinds[stat.S_IFMT(status.st_mode)]
    if stat.S_ISFIFO(status.st_mode):
        return None  # opening it would wait for its other end
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    try:
        ends = stat.S_ISREG(status.st_mode) or os.isatty(descriptor) or os.path.samestat(status, os.stat(os.devnull))
    finally:
        os.close(descriptor)
    return None if ends else "is a device that never ends"


def require_file(path: Path) -> None:
    """Refuse what is no regular file that can be read."""
    reason = why_unreadable(path) or (None if path.is_file() else "is no regular file")
    if reason:
        raise InputError(f"{path} {reason}")


def read_json(path: Path) -> Json:
    """Return the JSON object in a file."""
    require_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({_reason(error)}): make it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a JSON object: make it again")
    return value


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], Json]:
    """Return the counterpart of :func:`write_tensors`.

    Raises:
        InputError: a missing, truncated or foreign file, metadata that is no JSON object, or of another schema.
    """
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
    except (SafetensorError, ValueError, OSError, RecursionError, RuntimeError) as error:
        raise InputError(f"{path} is truncated or not safetensors ({_reason(error)}): make it again") from error
    if not isinstance(meta, dict):
        raise InputError(f"{path} says of itself a {type(meta).__name__}, not a JSON object: make it again")
    schema = meta.pop("schema", SCHEMA)
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {shown(schema)}, this version of dynlm reads {SCHEMA}: make it again")
    return tensors, meta


def tensor_kinds(path: Path) -> dict[str, str]:
    """The kind of number of each tensor in a safetensors file, in the file's own words: ``F32``, ``BF16``, ``I64``.

    Raises:
        InputError: a file that is not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path} is truncated or not safetensors ({_reason(error)}): make it again") from error


def require_layout(
    where: str | Path,
    tensors: Mapping[str, torch.Tensor],
    layout: Mapping[str, torch.Tensor],
    *,
    least: float | None = None,
    advice: str = ": make it again",
) -> None:
    """Refuse tensors that have not the names, shapes and kinds of number of ``layout``, or are not finite.

    A kind is floating point of any precision, or whole numbers. ``least``: what no number may be below.

    Raises:
        InputError: names ``where``, the tensor, what it is and what it should be.
    """
    for name in layout:
        if name not in tensors:
            raise InputError(f"{where} lacks the tensor {name!r}{advice}")
    for name, tensor in tensors.items():
        if name not in layout:
            raise InputError(f"{where} holds {shown(name)}, which does not belong there{advice}")
        wanted = layout[name]
        if tensor.shape != wanted.shape or _kind(tensor) != _kind(wanted):
            said = f"{_kind(tensor)} {tuple(tensor.shape)}, expected {_kind(wanted)} {tuple(wanted.shape)}"
            raise InputError(f"{where}: {name!r} is {said}{advice}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{where}: {name!r} holds numbers that are not finite{advice}")
        if least is not None and tensor.numel() and float(tensor.min()) < least:
            low = float(tensor.min())
            raise InputError(f"{where}: {name!r} holds {low:g}, expected at least {least:g}{advice}")


def _kind(tensor: torch.Tensor) -> str:
    """Floating point and whole numbers of any precision are two kinds; all others are their own."""
    if tensor.is_floating_point():
        return "floating point"
    whole = tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return "whole numbers" if whole else str(tensor.dtype).removeprefix("torch.")


def is_tensors(path: Path) -> bool:
    """Return whether a file is one that :func:`write_tensors` wrote: safetensors, whose header follows its length."""
    if not path.is_file() or path.is_symlink():
        return False
    with path.open("rb") as file:
        head = file.read(1 << 16)
    return head.startswith(b'{"__metadata__":{', 8) and b'"meta":' in head
