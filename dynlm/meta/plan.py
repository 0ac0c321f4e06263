"""What a meta-step will take, before it is run: memory and time.

A probe reads a few segments with the estimator itself, so that model, kernels and the largest temporary are in its
peak; what grows with the window is counted (:meth:`Estimator.footprint`), not guessed.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from dynlm.allocator import MIB
from dynlm.inner import InnerLoop
from dynlm.meta.estimators import Estimator, UnrollEstimator
from dynlm.meta.slices import choose_slices
from dynlm.types import InputError, Piece

PROBE = 4


class Plan(NamedTuple):
    """Prediction for one meta-step."""

    peak: int
    """bytes of the process (CPU) or of the device (CUDA) at the most"""
    seconds: float
    note: str
    """what was chosen: coordinates, or slices"""


def peak_memory() -> int:
    """Highest memory of this process so far in bytes; of the CUDA allocator where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    with contextlib.suppress(OSError, KeyError), open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) * 1024  # ru_maxrss begins at the parent's peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plan_step(estimator: Estimator, pieces: Sequence[Piece], window: int, streams: int = 1) -> Plan:
    """Predict a meta-step of ``streams`` windows of ``window`` segments, probing with the first of ``pieces``.

    The rule's meta-parameters keep their values; their gradients are cleared.
    """
    reader, probe = estimator.reader, list(pieces[:PROBE])
    if len(probe) < PROBE:
        raise InputError(f"the text has {len(probe)} segments, a plan needs {PROBE}")
    run_window(estimator, probe)  # compiles, and takes the largest temporary there is
    base = peak_memory() - estimator.footprint(PROBE)
    reading = timed(lambda: read(reader, probe))
    seconds = estimator.seconds(window, PROBE, reading, timed(lambda: run_window(estimator, probe)))
    positions = streams * estimator.position_size()
    reader.rule.zero_grad(set_to_none=True)
    return Plan(base + estimator.footprint(window) + positions, streams * seconds, estimator.note(window))


def read(reader: InnerLoop, pieces: Sequence[Piece]) -> None:
    reader.begin()
    for piece in pieces:
        reader.segment(*piece)


def run_window(estimator: Estimator, pieces: Sequence[Piece]) -> None:
    estimator.window(estimator.begin(), pieces, [1 / len(pieces)] * len(pieces))


def timed(work: Callable[[], object], turns: int = 3) -> float:
    """Seconds, the best of some turns."""
    best = float("inf")
    for _ in range(turns):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def require_fit(plan: Plan, limit: int, estimator: Estimator, window: int) -> None:
    """Raises InputError with a setting that fits, where the plan's peak is above ``limit`` bytes."""
    if plan.peak <= limit:
        return
    head = f"a meta-step over {window} segments peaks at {plan.peak / MIB:,.0f} MiB, the limit is {limit / MIB:,.0f}"
    free = limit - (plan.peak - estimator.footprint(window))
    if isinstance(estimator, UnrollEstimator) and free > 0:
        slices = choose_slices(window, estimator.cost, free)
        message = f"{head}: slices of {' and '.join(map(str, slices))} segments fit"
        raise InputError(message, setting="meta.estimator.slices")
    half = window
    while half > 2 and estimator.footprint(half) > free:
        half //= 2
    if free <= 0 or estimator.footprint(half) > free:
        message = f"{head}: even a window of {half} does not fit; use a smaller model or fewer articles at once"
        raise InputError(message, setting="meta.articles")
    message = f"{head}: windows of {half} segments fit, or lower the memory of recordings"
    raise InputError(message, setting="meta.truncation")


def available_memory() -> int:
    """Bytes that are free to take: on the device, or as the system estimates."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 2**63 - 1
