"""Buffers that a forward pass changes, such as the running statistics of batch normalisation.

Where a forward pass is computed again for its gradient, its modules must see the buffers of the first time, and the
second pass must leave no trace: each batch counts once, as in a plain training loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class BufferLog:
    """The buffers that changed inside :meth:`recording`, as they were before. ``with log:`` runs from there again, as
    often as asked, and puts the present buffers back."""

    def __init__(self) -> None:
        self._before: dict[nn.Module, dict[str, Tensor]] = {}
        self._present: list[list[tuple[nn.Module, dict[str, Tensor | None]]]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note the buffers of each module that runs inside in training mode, before it runs for the first time."""
        handle = register_module_forward_pre_hook(self._note)
        try:
            yield
        finally:
            handle.remove()
        for module in list(self._before):
            changed = {n: b for n, b in self._before[module].items() if not _same(b, module._buffers[n])}
            if changed:
                self._before[module] = changed
            else:
                del self._before[module]

    def _note(self, module: nn.Module, inputs: Any) -> None:
        if module.training and module._buffers and module not in self._before:
            found = {name: b for name, b in module._buffers.items() if b is not None}
            self._before[module] = {name: buffer.detach().clone() for name, buffer in found.items()}

    def __enter__(self) -> None:
        self._present.append([(module, dict(module._buffers)) for module in self._before])
        for module, buffers in self._before.items():
            for name, buffer in buffers.items():
                module._buffers[name] = buffer.clone()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, buffers in self._present.pop():
            module._buffers.update(buffers)


@contextmanager
def unchanged_buffers() -> Iterator[None]:
    """Inside, forward passes that a plain training loop does not have: they change copies of the buffers."""
    originals: dict[nn.Module, dict[str, Tensor | None]] = {}

    def swap(module: nn.Module, inputs: Any) -> None:
        if module.training and module._buffers and module not in originals:
            originals[module] = dict(module._buffers)
            copies = {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None}
            module._buffers.update(copies)

    handle = register_module_forward_pre_hook(swap)
    try:
        yield
    finally:
        handle.remove()
        for module, buffers in originals.items():
            module._buffers.update(buffers)


def _same(before: Tensor, now: Tensor | None) -> bool:
    return now is not None and before.shape == now.shape and torch.equal(before, now)
