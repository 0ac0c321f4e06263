"""What one window of reading leaves for the replay: gradients of the sampled coordinates, and what the rule observed.

Gradients are T × K numbers, in the weights' dtype or bfloat16, in memory, on the CPU, or in a memory-mapped file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynlm.inner import InnerLoop, Update
from dynlm.meta.sampling import Stratum
from dynlm.optim.base import Slots
from dynlm.settings import Count, Settings


@dataclass(frozen=True)
class RecordConfig(Settings):
    """How recorded gradients are kept."""

    dtype: Literal["weights", "bf16"] = "weights"
    """weights: exact; bf16: half the memory, gradients rounded to 8 bits"""
    where: Literal["device", "cpu", "disk"] = "device"
    """disk: a temporary memory-mapped file, which the system writes out when memory is short"""
    memory: Count = 96
    """MiB for what a window records: long windows get fewer coordinates; and for a block of the replay"""


class Recording:
    """One window, detached from every graph. ``capacity`` is the most segments it can hold."""

    def __init__(
        self, reader: InnerLoop, strata: Sequence[Stratum], capacity: int, config: RecordConfig | None = None
    ) -> None:
        """Takes the reader's present position as the start of the window."""
        self.priors, self.strata = list(reader.priors), list(strata)
        pairs = list(zip(self.strata, reader.state.slots, strict=True))
        self.theta = [s.take(t) for s, t in zip(self.strata, reader.thetas, strict=True)]
        self.slots: list[Slots] = [tuple(s.take(x) for x in slots) for s, slots in pairs]
        self.tensors = reader.state.tensors.detach().clone()
        self.grads = Store([s.index_K.numel() for s in strata], capacity, self.theta[0], config or RecordConfig())
        self.rows: list[list[Tensor]] = [[] for _ in strata]
        self.cols: list[list[Tensor]] = [[] for _ in strata]
        self.scalars = self.theta[0].new_empty(0)
        self.steps: list[int] = []
        self.weights: list[float] = []

    def add(self, step: Update, clock_step: int, weight: float) -> None:
        """Record one segment; ``weight`` is w_t, ``clock_step`` the time that the rule's update saw."""
        t, seen = len(self.weights), step.seen
        assert seen is not None, "an update was read"
        for i, (grad, stratum) in enumerate(zip(step.grads, self.strata, strict=True)):
            self.grads.write(i, t, stratum.take(grad))
            for kept, features in ((self.rows[i], seen.rows[i]), (self.cols[i], seen.cols[i])):
                for k, feature in enumerate(features):
                    if t == 0:  # one buffer each: small tensors that stay would leave holes between large ones that go
                        kept.append(feature.new_empty(self.grads.capacity, feature.numel()))
                    kept[k][t] = feature.reshape(-1)
        if t == 0:
            self.scalars = seen.scalars.new_empty(self.grads.capacity, *seen.scalars.shape)
        self.scalars[t] = seen.scalars
        self.steps.append(clock_step)
        self.weights.append(weight)

    def __len__(self) -> int:
        return len(self.weights)


class Store:
    """(capacity, K) numbers a tensor. One file for all of them where they are on disk, gone with the store."""

    def __init__(self, widths: Sequence[int], capacity: int, like: Tensor, config: RecordConfig) -> None:
        self.capacity, self.like = capacity, like
        dtype = torch.bfloat16 if config.dtype == "bf16" else like.dtype
        n = capacity * sum(widths)
        if config.where == "disk" and n:
            with tempfile.NamedTemporaryFile(prefix="dynlm-recording-") as file:  # unlinked: gone with the mapping
                flat = torch.from_file(file.name, shared=True, size=n, dtype=dtype)
        else:
            flat = torch.empty(n, dtype=dtype, device="cpu" if config.where == "cpu" else like.device)
        parts = flat.split([capacity * w for w in widths])
        self.parts = [part.view(capacity, w) for part, w in zip(parts, widths, strict=True)]

    def write(self, tensor: int, t: int, grad_K: Tensor) -> None:
        self.parts[tensor][t] = grad_K

    def read(self, tensor: int, window: int, block: slice) -> Tensor:
        """Return (window, block) in the weights' dtype and place."""
        part: Tensor = self.parts[tensor][:window, block]
        return part.to(self.like)
