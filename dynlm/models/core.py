"""The LSTM itself, without transformers: ``dynlm read`` needs no more of it, and starts in half the time.

Embedding, layers, projection and read-out, and how they run; :mod:`dynlm.models.lstm` makes a model of transformers of
them. The hidden state goes in and comes out, so that text can be read segment by segment.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, Protocol, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynlm.files import read_json, read_tensors, require_layout
from dynlm.models.padding import Padding
from dynlm.models.recurrence import lstm_layer, one_stream
from dynlm.models.tied import Link, embed, read_out
from dynlm.settings import Bound, Size, check
from dynlm.types import InputError

MODEL_TYPE = "dynlm_lstm"
Hidden = tuple[tuple[Tensor, Tensor], ...]
"""Per layer (h, c), each (B, layer width)."""
QUANTISED = ("torch.ao.nn.", "torch.nn.quantized")


class Sizes(TypedDict):
    """What config.json says of the model."""

    vocab_size: Annotated[int, Bound(1, 2**24)]
    embedding_size: Size
    hidden_size: Size
    num_hidden_layers: Annotated[int, Bound(1, 3)]
    tie_word_embeddings: NotRequired[bool]
    projection: NotRequired[bool]


class Dropouts(NamedTuple):
    """Probabilities in training; see :class:`dynlm.models.lstm.ModelConfig`."""

    input: float = 0.0
    hidden: float = 0.0
    weight: float = 0.0


class LSTMLayer(nn.Module):
    """One LSTM layer; gate order (input, forget, cell, output), one bias."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))

    def forward(
        self, inputs_BTD: Tensor, state: tuple[Tensor, Tensor], weight_drop: float, padding: Padding | None = None
    ) -> tuple[Tensor, Any]:
        run = padding.lstm if padding else lstm_layer
        weight_hh = F.dropout(self.weight_hh, weight_drop, self.training)
        return run(inputs_BTD, state, self.weight_ih, weight_hh, self.bias)


class LSTMBody(nn.Module):
    """Embedding, layers and projection: what all classes of the LSTM share."""

    dropouts = Dropouts()

    def build(self, vocab_size: int, embedding_size: int, hidden_size: int, layers: int, projection: bool) -> None:
        """Make the modules. ``projection``: the last layer has ``hidden_size`` units too, and a matrix follows."""
        last = hidden_size if projection else embedding_size
        sizes = [embedding_size, *[hidden_size] * (layers - 1), last]
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.layers = nn.ModuleList(LSTMLayer(a, b) for a, b in pairwise(sizes))
        self.projection = nn.Linear(hidden_size, embedding_size, bias=False) if projection else None

    def initial_hidden(self, batch: int) -> Hidden:
        """Zeros: the state before the first token of an article."""
        weight = self.embedding.weight
        return tuple((weight.new_zeros(batch, n), weight.new_zeros(batch, n)) for n in self._widths())

    def _widths(self) -> list[int]:
        return [cast(LSTMLayer, layer).weight_hh.shape[1] for layer in self.layers]

    def link(self, input_ids: Tensor | None, head: nn.Module) -> Link | None:
        """For reading with tied weights: embedding and read-out share the buffer of their gradient."""
        if input_ids is None or self.embedding.weight is not head.weight:
            return None
        return Link() if not self.training and torch.is_grad_enabled() and one_stream(input_ids) else None

    def run(
        self, embedded: Tensor, hidden: Hidden | None, padding: Padding | None = None
    ) -> tuple[list[Tensor], Hidden]:
        """Return the embedding and each layer's output, (B, T, width) each, and the hidden state after the text."""
        dropouts, batch = self.dropouts, embedded.shape[0]
        if hidden is None:
            hidden = self.initial_hidden(batch)
        expected = [(batch, n) for n in self._widths() for _ in "hc"]
        found = [tuple(tensor.shape) for state in hidden for tensor in state]
        if found != expected:
            raise InputError(f"the hidden state has shapes {found}: this model and batch need {expected}")
        states, new_hidden = [embedded], []
        for i, (layer, state) in enumerate(zip(self.layers, hidden, strict=True)):
            dropped = locked_dropout(states[-1], dropouts.hidden if i else dropouts.input, self.training)
            x, state = layer(dropped, state, dropouts.weight, padding)
            states.append(x)
            new_hidden.append(state)
        if self.projection is not None:
            states.append(self.projection(states[-1]))
        return states, tuple(new_hidden)


def locked_dropout(x_BTD: Tensor, p: float, training: bool) -> Tensor:
    """One mask a sequence, shared by all its time steps (variational dropout, arXiv:1512.05287)."""
    if not training or p == 0:
        return x_BTD
    mask = torch.empty_like(x_BTD[:, :1]).bernoulli_(1 - p) / (1 - p)
    return x_BTD * mask


class ReadOut(NamedTuple):
    """What reading gives: ``logits`` (1, T, V), and ``hidden`` after the text."""

    logits: Tensor
    hidden: Hidden


class ReadingLSTM(LSTMBody):
    """The LSTM as `dynlm read` uses it: the parameter names and the bits of the model of transformers."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, layers = sizes["embedding_size"], sizes["num_hidden_layers"]
        self.build(sizes["vocab_size"], width, sizes["hidden_size"], layers, sizes.get("projection", False))
        self.lm_head = nn.Linear(width, sizes["vocab_size"])
        if sizes.get("tie_word_embeddings", True):
            self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, hidden: Hidden | None = None) -> ReadOut:
        weight, link = self.embedding.weight, self.link(input_ids, self.lm_head)
        states, new_hidden = self.run(
            embed(input_ids[0], weight, link)[None] if link else F.embedding(input_ids, weight), hidden
        )
        head = self.lm_head
        logits = read_out(states[-1][0], head.weight, head.bias, link)[None] if link else head(states[-1])
        return ReadOut(logits, new_hidden)


class GivesLogits(Protocol):
    """What the forward pass of an LSTM gives."""

    logits: Any
    hidden: Any


class LSTMScorer:
    """Scores segments of one article with an LSTM that carries its hidden state."""

    def __init__(self, model: LSTMBody) -> None:
        require_float(model)
        self.model = model

    def __call__(self, inputs_S: Tensor, targets_S: Tensor, hidden: Hidden | None) -> tuple[Tensor, Hidden]:
        output: GivesLogits = self.model(inputs_S[None], hidden=hidden)
        losses_S = F.cross_entropy(output.logits[0], targets_S, reduction="none")
        return losses_S, output.hidden


def require_float(model: nn.Module) -> None:
    """Refuse layers of torch's quantisation: they have no gradient, and activations share a scale with later tokens."""
    quantised = [n for n, module in model.named_modules() if type(module).__module__.startswith(QUANTISED)]
    if quantised:
        raise InputError(
            f"{type(model).__name__} has quantised layers, such as {quantised[0]!r}: quantised weights cannot be "
            "adapted, and activations that are quantised at run time see later tokens: load the model without, or "
            "quantise weights alone and use LoRA or adapt other tensors"
        )


def is_lstm(folder: Path) -> bool:
    """Return whether ``folder`` holds an LSTM that ``dynlm train`` wrote."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == MODEL_TYPE


def load_lstm(folder: Path) -> ReadingLSTM:
    """Return the LSTM in ``folder``, float32 on the CPU; its file may hold half precision.

    Raises:
        InputError: a missing, truncated or foreign model folder.
    """
    sizes: Sizes = check(Sizes, read_json(folder / "config.json"), str(folder / "config.json"))
    tensors, _ = read_tensors(folder / "model.safetensors")
    try:
        with torch.device("meta"):  # the file gives the weights
            model = ReadingLSTM(sizes)
        tied = model.lm_head.weight is model.embedding.weight
        given = {name: tensor.float() for name, tensor in tensors.items()}
        if tied:
            given["lm_head.weight"] = given["embedding.weight"]
        require_layout("it", given, model.state_dict(), advice="")
        model.load_state_dict(given, assign=True)
        if tied:
            model.lm_head.weight = model.embedding.weight
    except (InputError, KeyError, RuntimeError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise InputError(f"{folder} is not a whole model ({reason}): train it again") from None
    return model.eval()
