"""The LSTM of dynlm.models.lstm for reading only, without transformers: ``dynlm read`` starts in half the time.

Same parameter names, same functions in the same order, so losses and gradients are the same bit for bit
(tests/models/test_light.py). No dropout, no batch, no generation. A model is its own scorer.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynlm.files import read_json, read_tensors, require_layout
from dynlm.models.recurrence import lstm_layer, one_stream
from dynlm.models.tied import Link, embed, read_out
from dynlm.settings import Bound, Size, check
from dynlm.types import InputError

MODEL_TYPE = "dynlm_lstm"
State = tuple[tuple[Tensor, Tensor], ...]


class Sizes(TypedDict):
    """What config.json says of the model."""

    vocab_size: Annotated[int, Bound(1, 2**24)]
    embedding_size: Size
    hidden_size: Size
    num_hidden_layers: Annotated[int, Bound(1, 3)]
    tie_word_embeddings: NotRequired[bool]
    projection: NotRequired[bool]


class LightLayer(nn.Module):
    """Weights of one LSTM layer."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))


class LightEnds(nn.Module):
    """The embedding, the projection, or the read-out with its bias."""

    def __init__(self, weight_VD: nn.Parameter, bias: bool) -> None:
        super().__init__()
        self.weight = weight_VD
        if bias:
            self.bias = nn.Parameter(torch.empty(weight_VD.shape[0]))


class LightLSTM(nn.Module):
    """Scores segments of one text: (inputs_S, targets_S, hidden) to (losses_S in nats, hidden)."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        width, vocab_size = config["embedding_size"], config["vocab_size"]
        projected = config.get("projection", False)
        last = config["hidden_size"] if projected else width
        widths = [width, *[config["hidden_size"]] * (config["num_hidden_layers"] - 1), last]
        self.tied: bool = config.get("tie_word_embeddings", True)
        self.embedding = LightEnds(nn.Parameter(torch.empty(vocab_size, width)), bias=False)
        self.layers = nn.ModuleList(LightLayer(a, b) for a, b in pairwise(widths))
        self.projection = LightEnds(nn.Parameter(torch.empty(width, last)), bias=False) if projected else None
        head = self.embedding.weight if self.tied else nn.Parameter(torch.empty(vocab_size, width))
        self.lm_head = LightEnds(head, bias=True)

    def forward(self, inputs_S: Tensor, targets_S: Tensor, hidden: State | None) -> tuple[Tensor, State]:
        ids, weight, head = inputs_S[None], self.embedding.weight, self.lm_head
        link = Link() if self.tied and torch.is_grad_enabled() and one_stream(ids) else None
        x = embed(inputs_S, weight, link)[None] if link else F.embedding(ids, weight)
        widths = [cast(LightLayer, layer).weight_hh.shape[1] for layer in self.layers]
        if hidden and [t.shape for state in hidden for t in state] != [(1, n) for n in widths for _ in "hc"]:
            raise InputError("the hidden state is of another model")
        new_hidden = []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, LightLayer)
            state = hidden[i] if hidden else (x.new_zeros(1, layer.weight_hh.shape[1]),) * 2
            x, state = lstm_layer(x, state, layer.weight_ih, layer.weight_hh, layer.bias)
            new_hidden.append(state)
        if self.projection is not None:
            x = F.linear(x, self.projection.weight)
        logits_SV = read_out(x[0], head.weight, head.bias, link) if link else F.linear(x[0], head.weight, head.bias)
        return F.cross_entropy(logits_SV, targets_S, reduction="none"), tuple(new_hidden)


def is_light(folder: Path) -> bool:
    """Return whether ``folder`` holds an LSTM that ``dynlm train`` wrote."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == MODEL_TYPE


def load_light(folder: Path) -> LightLSTM:
    """Return the LSTM in ``folder``, float32 on the CPU; its file may hold half precision.

    Raises:
        InputError: a missing, truncated or foreign model folder.
    """
    config: Sizes = check(Sizes, read_json(folder / "config.json"), str(folder / "config.json"))
    tensors, _ = read_tensors(folder / "model.safetensors")
    try:
        model = LightLSTM(config)
        given = dict(tensors)
        if model.tied:
            given["lm_head.weight"] = given["embedding.weight"]
        require_layout("it", given, model.state_dict(), advice="")
        model.load_state_dict({name: tensor.float() for name, tensor in given.items()})
    except (InputError, KeyError, RuntimeError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise InputError(f"{folder} is not a whole model ({reason}): train it again") from None
    return model.eval()
