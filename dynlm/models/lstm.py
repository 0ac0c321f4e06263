"""An LSTM language model as a transformers ``PreTrainedModel``.

Input and output embeddings are tied; 1 to 3 layers; the AWD-LSTM regularisers (Merity et al. 2017, arXiv:1708.02182)
are options: weight drop on the recurrent matrices, locked dropout, embedding dropout, AR and TAR. The hidden state goes
in and comes out, so that text can be read segment by segment. ``save_pretrained``, ``from_pretrained``,
``AutoModelForCausalLM`` and ``generate`` work once ``dynlm.models.lstm`` is imported.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from dynlm.models.recurrence import lstm_layer, one_stream
from dynlm.models.tied import Link, embed, read_out
from dynlm.types import InputError

Hidden = tuple[tuple[Tensor, Tensor], ...]
"""Per layer (h, c), each (B, layer width)."""


@dataclass(frozen=True)
class ModelConfig:
    """The base model of a recipe: an LSTM with tied embeddings, or any causal language model, trained already."""

    pretrained: str = ""
    """folder or hub name of a causal language model of transformers, which is taken as it is; without it an LSTM of the
    sizes below is trained"""
    embedding_size: int = 256
    """width of the embedding and of the last layer's output"""
    hidden_size: int = 256
    """width between layers; one layer has none"""
    layers: int = 1
    """LSTM layers, 1 to 3"""
    embedding_dropout: float = 0.0
    """probability that a word's whole embedding is dropped for a batch"""
    input_dropout: float = 0.0
    """locked dropout on the first layer's input"""
    hidden_dropout: float = 0.0
    """locked dropout between layers"""
    output_dropout: float = 0.0
    """locked dropout on the last layer's output"""
    weight_drop: float = 0.0
    """probability that a recurrent weight is dropped for a batch"""
    activation_regularization: float = 0.0
    """AR: weight of the mean squared output"""
    temporal_activation_regularization: float = 0.0
    """TAR: weight of the mean squared change of the output over time"""

    def build(self, vocab_size: int, eos_token_id: int, seed: int) -> LSTMForCausalLM:
        """A fresh model with weights drawn from ``seed``."""
        if not 1 <= self.layers <= 3:
            raise InputError(f"model.layers is {self.layers}: expected 1 to 3")
        settings = {name: value for name, value in asdict(self).items() if name not in ("layers", "pretrained")}
        torch.manual_seed(seed)
        return LSTMForCausalLM(
            LSTMConfig(
                vocab_size=vocab_size,
                num_hidden_layers=self.layers,
                bos_token_id=eos_token_id,
                eos_token_id=eos_token_id,
                **settings,
            )
        )


class LSTMConfig(PreTrainedConfig):
    """Sizes and regularisers. Dropouts are probabilities, active in training only."""

    model_type = "dynlm_lstm"

    vocab_size: int = 4096
    embedding_size: int = 256
    hidden_size: int = 256
    num_hidden_layers: int = 1
    embedding_dropout: float = 0.0
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    weight_drop: float = 0.0
    activation_regularization: float = 0.0
    temporal_activation_regularization: float = 0.0
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


@dataclass
class LSTMOutput(ModelOutput):
    """``loss``: mean nats a target plus ``penalty`` (AR + TAR); ``logits`` (B, T, V); ``hidden`` after the text."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: Hidden | None = None
    penalty: Tensor | None = None


class LSTMLayer(nn.Module):
    """One LSTM layer; gate order (input, forget, cell, output), one bias, forget gate biased open by 1."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))

    def reset_parameters(self) -> None:
        hidden_size = self.weight_hh.shape[1]
        bound = hidden_size**-0.5
        nn.init.uniform_(self.weight_ih, -bound, bound)
        nn.init.uniform_(self.weight_hh, -bound, bound)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.bias[hidden_size : 2 * hidden_size])

    def forward(self, inputs_BTD: Tensor, state: tuple[Tensor, Tensor], weight_drop: float) -> tuple[Tensor, Any]:
        weight_hh = F.dropout(self.weight_hh, weight_drop, self.training)
        return lstm_layer(inputs_BTD, state, self.weight_ih, weight_hh, self.bias)


class LSTMForCausalLM(PreTrainedModel, GenerationMixin):
    """The LSTM language model. ``labels`` follow transformers: equal to ``input_ids``, shifted inside, -100 ignored."""

    config: LSTMConfig
    config_class = LSTMConfig
    base_model_prefix = "lstm"
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.weight": "embedding.weight"}
    _is_stateful = True
    _no_split_modules = ["LSTMLayer"]

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        sizes = [config.embedding_size, *[config.hidden_size] * (config.num_hidden_layers - 1), config.embedding_size]
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.layers = nn.ModuleList(LSTMLayer(a, b) for a, b in pairwise(sizes))
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LSTMLayer):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.05)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.lm_head)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def initial_hidden(self, batch: int) -> Hidden:
        """Zeros: the state before the first token of an article."""
        weight = self.embedding.weight
        return tuple((weight.new_zeros(batch, n), weight.new_zeros(batch, n)) for n in self._widths())

    def _widths(self) -> list[int]:
        return [cast(LSTMLayer, layer).weight_hh.shape[1] for layer in self.layers]

    def forward(
        self, input_ids: Tensor, hidden: Hidden | None = None, labels: Tensor | None = None, **ignored: Any
    ) -> LSTMOutput:
        """``input_ids`` (B, T); extra arguments that ``generate`` passes to every model are ignored."""
        config = self.config
        link = self._link(input_ids)
        raw, new_hidden = self._run(input_ids, hidden or self.initial_hidden(input_ids.shape[0]), link)
        dropped = locked_dropout(raw, config.output_dropout, self.training)
        head = self.lm_head
        logits = read_out(dropped[0], head.weight, head.bias, link)[None] if link else head(dropped)
        penalty = self._activation_penalty(dropped, raw)
        loss = None
        if labels is not None:
            loss = penalty + F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return LSTMOutput(loss=loss, logits=logits, hidden=new_hidden, penalty=penalty)

    def _link(self, input_ids: Tensor) -> Link | None:
        """For reading with tied weights: embedding and read-out share the buffer of their gradient."""
        tied = self.embedding.weight is self.lm_head.weight
        return Link() if tied and not self.training and torch.is_grad_enabled() and one_stream(input_ids) else None

    def _run(self, input_ids: Tensor, hidden: Hidden, link: Link | None) -> tuple[Tensor, Hidden]:
        config = self.config
        weight = self.embedding.weight
        if self.training and config.embedding_dropout:
            keep = torch.empty_like(weight[:, :1]).bernoulli_(1 - config.embedding_dropout)
            weight = weight * (keep / (1 - config.embedding_dropout))  # whole words are dropped
        embedded = embed(input_ids[0], weight, link)[None] if link else F.embedding(input_ids, weight)
        x = locked_dropout(embedded, config.input_dropout, self.training)
        new_hidden = []
        for i, (layer, state) in enumerate(zip(self.layers, hidden, strict=True)):
            if i:
                x = locked_dropout(x, config.hidden_dropout, self.training)
            x, state = layer(x, state, config.weight_drop)
            new_hidden.append(state)
        return x, tuple(new_hidden)

    def _activation_penalty(self, dropped: Tensor, raw: Tensor) -> Tensor:
        """AR + TAR of arXiv:1708.02182, zero outside training."""
        config, penalty = self.config, raw.new_zeros(())
        if self.training and config.activation_regularization:
            penalty = penalty + config.activation_regularization * dropped.square().mean()
        if self.training and config.temporal_activation_regularization and raw.shape[1] > 1:
            penalty = penalty + config.temporal_activation_regularization * raw.diff(dim=1).square().mean()
        return penalty

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, hidden: Hidden | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids if hidden is None else input_ids[:, -1:], "hidden": hidden}

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs["hidden"] = outputs.get("hidden")
        return model_kwargs


def locked_dropout(x_BTD: Tensor, p: float, training: bool) -> Tensor:
    """One mask a sequence, shared by all its time steps (variational dropout, arXiv:1512.05287)."""
    if not training or p == 0:
        return x_BTD
    mask = torch.empty_like(x_BTD[:, :1]).bernoulli_(1 - p) / (1 - p)
    return x_BTD * mask


AutoConfig.register(LSTMConfig.model_type, LSTMConfig, exist_ok=True)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM, exist_ok=True)
