"""Several processes that do the work of one command: those of ``--workers``, of torchrun or of ``accelerate launch``.

All of them run the same command on the same files and take the same decisions. Articles, windows or tasks are spread
over them, and every process gets all results, in their order, so that sums add up in one order too: how many processes
there are changes no bit of a result. The first one, the main process, alone prints and writes.

With one process nothing here does anything, and torch.distributed is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

from dynlm.types import DivergedError, InputError

Result = TypeVar("Result")
PATIENCE = timedelta(days=30)
"""to wait for the others: one may read for hours; a process that dies closes its connections, which ends the wait"""
_together = False
"""inside :func:`joined`, but not where the main process works alone"""


class LostProcess(Exception):  # noqa: N818 (not this process's error)
    """Another process of this command has ended, so that nothing can be finished together."""


def launched() -> int:
    """Return how many processes a launcher has started for this command, by its environment; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def is_main() -> bool:
    """Whether this process is the only one, or the first of several that a launcher has started for one command."""
    return rank() == 0


def count() -> int:
    """Return how many processes share the work that is done now; 1 where this one works alone."""
    return launched() if _together else 1


def neighbors() -> int:
    """Return how many processes of this command this machine has, this one with them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or count()) if count() > 1 else 1


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that a launcher has started work together; nothing where there is but one.

    Raises:
        LostProcess: one of them has ended, or never came.
    """
    global _together
    if launched() == 1:
        yield
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
    with _talking():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    _together = True
    try:
        yield
        barrier()  # who leaves first would look lost
    finally:
        _together = False
        distributed.destroy_process_group()


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo says of a closed connection
        raise LostProcess(str(error)) from error


def barrier() -> None:
    """Wait until every process is here."""
    exchanged(None)


def exchanged(value: Result) -> list[Result]:
    """Return the values that the processes give, in their order, to all of them. Each must call this as often.

    They travel as torch.distributed sends objects, between processes of one user and one command.

    Raises:
        LostProcess: one of the others has ended.
    """
    if count() == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * count()
    with _talking():
        distributed.all_gather_object(values, value)
    return values


def shares(costs: Sequence[float], n: int) -> list[list[int]]:
    """Divide work over ``n`` processes: the longest first, each to whom has the least; returns indices, ascending.

    The longest share is at most 4/3 of the best division's (Graham 1969).
    """
    loads, divided = [0.0] * n, [list[int]() for _ in range(n)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = loads.index(min(loads))
        loads[least] += costs[i]
        divided[least].append(i)
    return [sorted(share) for share in divided]


def share(costs: Sequence[float], *, divided: bool = True) -> list[int]:
    """Return what this process does of the work that :func:`spread` spreads."""
    if divided and count() > 1:
        return shares(costs, count())[rank()]
    return list(range(len(costs))) if count() == 1 or is_main() else []


def spread(work: Callable[[int], Result], costs: Sequence[float], *, divided: bool = True) -> list[Result]:
    """Do ``work(0)``, ``work(1)``, …, spread over the processes by what each costs; returns all results, in order.

    Not ``divided`` is what must be done one after the other: the main process does it, the others wait.

    Raises:
        DivergedError: that of the first which diverges, in every process.
        LostProcess: one of the others has ended.
    """
    found = dict[int, tuple[Result | None, DivergedError | None]]()
    for i in share(costs, divided=divided):
        try:
            found[i] = work(i), None
        except DivergedError as error:
            found[i] = None, error
            break  # nothing that comes later can be the first
    together = {i: result for part in exchanged(found) for i, result in part.items()}
    results = list[Result]()
    for i in sorted(together):
        result, diverged = together[i]
        if diverged is not None:
            raise diverged
        results.append(cast(Result, result))
    return results


def largest(number: int) -> int:
    """Return the largest of what the processes give, to all of them."""
    return max(exchanged(number))


def require_work(number: int, setting: str) -> None:
    """Refuse more processes than there are tasks to spread.

    Raises:
        InputError: with the setting that says how many tasks there are.
    """
    if number < count():
        raise InputError(
            f"{setting} is {number}, fewer than the {count()} processes that would share them: raise it, or start fewer"
        )


@contextmanager
def turn() -> Iterator[None]:
    """Inside, files of the run change. Each process comes here, so that all have read what was, and see what is new."""
    barrier()
    yield
    barrier()


def once(work: Callable[[], Any]) -> None:
    """Let the main process do what is done once, as writing a file; the others wait until it is done."""
    global _together
    with turn():
        if is_main():
            before, _together = _together, False
            try:
                work()
            finally:
                _together = before


def require_alike(value: object, what: str) -> None:
    """Refuse processes that were started with different settings or files.

    Raises:
        InputError: with the first process that has another ``value`` than the main one.
    """
    values = exchanged(value)
    other = next((i for i, other in enumerate(values) if other != values[0]), None)
    if other is not None:
        raise InputError(
            f"process {other} of {len(values)} was started with another {what} than the first: give all the same"
        )
