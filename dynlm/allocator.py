"""The C library's allocator, where it is glibc; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

MIB = 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


def give_back_memory() -> None:
    """Return what is free to the system.

    The small tensors of a graph lie between the large ones, and the holes that these leave are seldom filled again: 96
    segments of a 1.57M-weight model in slices of 24 and 4 take 294 MiB; the process grew by 306 MiB, else by 1,561.
    """
    _function("malloc_trim")(0)


@cache
def keep_freed_memory() -> None:
    """Let the process keep freed blocks of up to 32 MiB, 256 MiB in all, instead of asking for them anew.

    Gradients are allocated at every segment, and the system clears each page that it hands out: forward and backward
    pass over 32 tokens take 4.2 ms instead of 5.8 with 1.57M weights (docs/LOG.md).
    """
    mallopt = _function("mallopt")
    mallopt(_MMAP_THRESHOLD, 32 * MIB)  # the most that glibc allows
    mallopt(_TRIM_THRESHOLD, 256 * MIB)


@cache
def _function(name: str) -> Callable[..., int]:
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another C library; Windows has none under this name
        return lambda *arguments: 0
    return function
