"""Real processes that work together, forked from the test, so that they start in no time."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import TCPStore

from dynlm import processes
from dynlm.cli.launch import environments


def together(work: Callable[[], Any], n: int = 2) -> list[Any]:
    """Do ``work`` in ``n`` processes at once; returns what each gives, or its exception."""
    store, context = (
        TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False),
        multiprocessing.get_context("fork"),
    )
    started = []
    for environment in environments(n, store.port):
        here, there = context.Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside the store's thread, which holds no lock
            process = context.Process(target=_member, args=(work, environment, there))
            process.start()
        there.close()
        started.append((process, here))
    results = [pickle.loads(here.recv_bytes()) for _, here in started]
    for process, _ in started:
        process.join()
    return results


def _member(work, environment, pipe):
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        with processes.joined():
            result = work()
    except BaseException as error:
        result = error
    pipe.send_bytes(pickle.dumps(result))
