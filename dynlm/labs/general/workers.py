"""Processes that work side by side, and end when their parent ends, however it ended."""

from __future__ import annotations

import multiprocessing
import os
import threading
import weakref
from concurrent.futures import ProcessPoolExecutor


def make_workers(n: int) -> ProcessPoolExecutor:
    """``n`` processes that are forked on demand: they share what this one has in memory.

    Each waits in a thread for the end of a pipe that only this process can write to. The system closes it when this
    process ends, also by SIGKILL, and then they end too.
    """
    reading_end, writing_end = os.pipe()
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(n, context, initializer=_watch, initargs=(reading_end, writing_end))
    for end in (reading_end, writing_end):
        weakref.finalize(pool, os.close, end)
    return pool


def _watch(reading_end: int, writing_end: int) -> None:
    os.close(writing_end)  # of this process; the parent's stays open
    threading.Thread(target=_end_with, args=(reading_end,), daemon=True).start()


def _end_with(reading_end: int) -> None:
    os.read(reading_end, 1)
    os._exit(1)
