"""What a base model works with while it scores: its last hidden states and its logits.

Forward hooks collect both while a segment is scored, so scorers and models stay as they are. A scorer may call the
model several times a segment, or on more text than the segment: the last S positions of what it saw are the segment's.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from dynlm.models.core import LSTMBody
from dynlm.types import InputError


class Tap:
    """Inside its context, keeps the hidden states that feed a model's output layer, and its logits, without graph."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._states: list[Tensor] = []
        self._logits: list[Tensor] = []

    def __enter__(self) -> Self:
        self._handles = [self.model.register_forward_hook(self._see_output)]
        if isinstance(self.model, LSTMBody):  # its read-out is not called as a module while reading
            self._handles.append(self.model.layers[-1].register_forward_hook(self._see_layer))
        elif (head := _output_layer(self.model)) is not None:
            self._handles.append(head.register_forward_pre_hook(self._see_input))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _see_output(self, module: nn.Module, inputs: Any, output: Any) -> None:
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is not None:
            self._logits.append(logits.detach()[0])

    def _see_layer(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._states.append(output[0].detach()[0])

    def _see_input(self, module: nn.Module, inputs: Any) -> None:
        self._states.append(inputs[0].detach()[0])

    def clear(self) -> None:
        """Forget what was seen."""
        self._states.clear()
        self._logits.clear()

    def states(self, size: int) -> Tensor:
        """Return (S, D) hidden states that the last ``size`` scores were read out from."""
        return _last(self._states, size, "hidden states before an output layer (get_output_embeddings)")

    def logits(self, size: int) -> Tensor:
        """Return (S, V) logits of the last ``size`` positions."""
        return _last(self._logits, size, "logits")


def _output_layer(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    layer = find() if find else None
    return layer if isinstance(layer, nn.Module) else None


def _last(parts: list[Tensor], size: int, what: str) -> Tensor:
    rows = torch.cat(parts) if parts else None
    if rows is None or rows.dim() != 2 or rows.shape[0] < size:
        raise InputError(f"the model shows no {what} while it scores: methods with a cache and calibration need them")
    rows = rows[-size:]
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
