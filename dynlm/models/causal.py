"""Base models as scorers: losses of a segment, hidden state in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dynlm.models.lstm import Hidden, LSTMForCausalLM
from dynlm.types import InputError


class LSTMScorer:
    """Scores segments of one article with an LSTM that carries its hidden state."""

    def __init__(self, model: LSTMForCausalLM) -> None:
        self.model = model

    def __call__(self, inputs_S: Tensor, targets_S: Tensor, hidden: Hidden | None) -> tuple[Tensor, Hidden]:
        output = self.model(inputs_S[None], hidden=hidden)
        losses_S = F.cross_entropy(output.logits[0], targets_S, reduction="none")
        assert output.hidden is not None
        return losses_S, output.hidden


def load_model(folder: Path, device: torch.device | str = "cpu") -> LSTMForCausalLM:
    """A base model written by ``dynlm train`` (or ``save_pretrained``).

    Raises:
        InputError: a missing, truncated or foreign model folder.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model (config.json): run `dynlm train` first")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the loader raises many kinds; all mean that this folder is not a whole model
        raise InputError(
            f"{folder} is not a whole model ({str(error).strip().splitlines()[0]}): train it again"
        ) from None
    if not isinstance(model, LSTMForCausalLM):
        raise InputError(f"{folder} holds a {type(model).__name__}: reading needs an LSTM language model so far")
    placed: LSTMForCausalLM = cast(Any, model).to(device).eval()
    return placed
