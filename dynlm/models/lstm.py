"""An LSTM language model as a transformers ``PreTrainedModel``.

Input and output embeddings are tied; 1 to 3 layers; the AWD-LSTM regularisers (Merity et al. 2017, arXiv:1708.02182)
are options: weight drop on the recurrent matrices, locked dropout, embedding dropout, AR and TAR. The hidden state goes
in and comes out, so that text can be read segment by segment. ``save_pretrained``, ``from_pretrained``, the Auto
classes, ``generate``, ``pipeline`` and ``Trainer`` work once ``dynlm.models.lstm`` is imported, which a saved model's
folder has transformers do (``trust_remote_code=True``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    initialization,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput

from dynlm.models.core import Dropouts, Hidden, LSTMBody, LSTMLayer, locked_dropout
from dynlm.models.generation import HiddenGenerationMixin
from dynlm.models.lstm_config import LSTMConfig as LSTMConfig
from dynlm.models.padding import Padding, padding_of
from dynlm.models.readout import mean_loss
from dynlm.models.tied import Link, embed, read_out
from dynlm.settings import Bound, NotNegative, Settings, Share, Size
from dynlm.types import InputError

LOSS_ARGUMENTS = {"num_items_in_batch", "ignore_index", "shift_labels"}


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The base model of a recipe: an LSTM with tied embeddings, or any causal language model, trained already."""

    pretrained: str = ""
    """folder or hub name of a causal language model of transformers, which is taken as it is; without it an LSTM of the
    sizes below is trained"""
    embedding_size: Size = 256
    """width of the embedding and of the last layer's output"""
    hidden_size: Size = 256
    """width between layers, and of the last one where it is projected; else one layer has none"""
    layers: Annotated[int, Bound(1, 3)] = 1
    """LSTM layers, 1 to 3"""
    projection: bool = False
    """the last layer has hidden_size units too, and a matrix takes its output to embedding_size: a wide layer beside a
    narrow embedding"""
    embedding_dropout: Share = 0.0
    """probability that a word's whole embedding is dropped for a batch"""
    input_dropout: Share = 0.0
    """locked dropout on the first layer's input"""
    hidden_dropout: Share = 0.0
    """locked dropout between layers"""
    output_dropout: Share = 0.0
    """locked dropout on the last layer's output"""
    weight_drop: Share = 0.0
    """probability that a recurrent weight is dropped for a batch"""
    activation_regularization: NotNegative = 0.0
    """AR: weight of the mean squared output"""
    temporal_activation_regularization: NotNegative = 0.0
    """TAR: weight of the mean squared change of the output over time"""

    def build(
        self, vocab_size: int, start_id: int, seed: int, *, eos_id: int | None = None, pad_id: int | None = None
    ) -> LSTMForCausalLM:
        """Return a fresh model with weights drawn from ``seed``."""
        settings = {name: value for name, value in asdict(self).items() if name not in ("layers", "pretrained")}
        torch.manual_seed(seed)
        return LSTMForCausalLM(
            LSTMConfig(
                vocab_size=vocab_size,
                num_hidden_layers=self.layers,
                bos_token_id=start_id,
                eos_token_id=eos_id,
                pad_token_id=pad_id,
                **settings,
            )
        )


@dataclass
class LSTMModelOutput(ModelOutput):
    """``last_hidden_state`` (B, T, D); ``hidden`` after the text; ``hidden_states``: embedding, layers' outputs."""

    last_hidden_state: Tensor | None = None
    hidden: Hidden | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class LSTMOutput(ModelOutput):
    """``loss``: mean nats a target plus ``penalty`` (AR + TAR); ``logits`` (B, T, V); ``hidden`` after the text."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: Hidden | None = None
    penalty: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class LSTMPreTrainedModel(PreTrainedModel, LSTMBody):
    """Embedding and layers: what the two classes of transformers below share."""

    config: LSTMConfig
    config_class = LSTMConfig
    base_model_prefix = "lstm"
    main_input_name = "input_ids"
    _no_split_modules = ["LSTMLayer"]

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        width, layers = config.embedding_size, config.num_hidden_layers
        self.build(config.vocab_size, width, config.hidden_size, layers, config.projection)

    @property
    def dropouts(self) -> Dropouts:  # type: ignore[override]
        config = self.config
        return Dropouts(config.input_dropout, config.hidden_dropout, config.weight_drop)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw new weights, but for those that were just loaded: functions of ``initialization`` know them."""
        if isinstance(module, LSTMLayer):
            hidden_size = module.weight_hh.shape[1]
            bound = hidden_size**-0.5
            initialization.uniform_(module.weight_ih, -bound, bound)
            initialization.uniform_(module.weight_hh, -bound, bound)
            bias = torch.zeros_like(module.bias)
            bias[hidden_size : 2 * hidden_size] = 1  # the forget gate begins open
            initialization.copy_(module.bias, bias)
        elif isinstance(module, nn.Embedding):
            initialization.normal_(module.weight, std=0.05)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            initialization.zeros_(module.bias)
        elif isinstance(module, nn.Linear):  # the projection
            initialization.normal_(module.weight, std=module.in_features**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value  # type: ignore[assignment]

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, link: Link | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError(f"{type(self).__name__} reads either input_ids or inputs_embeds: give one of them")
        if input_ids is None:
            return cast(Tensor, inputs_embeds)
        weight = self.embedding.weight
        if self.training and self.config.embedding_dropout:
            keep = torch.empty_like(weight[:, :1]).bernoulli_(1 - self.config.embedding_dropout)
            weight = weight * (keep / (1 - self.config.embedding_dropout))  # whole words are dropped
        return embed(input_ids[0], weight, link)[None] if link else F.embedding(input_ids, weight)


class LSTMModel(LSTMPreTrainedModel):
    """The LSTM without its read-out, as ``AutoModel`` loads it."""

    _keys_to_ignore_on_load_unexpected = [r"lm_head\."]

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        hidden: Hidden | None = None,
        *,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> LSTMModelOutput:
        """``input_ids`` (B, T), or ``inputs_embeds`` (B, T, D); ``attention_mask`` (B, T) is 0 at padded places."""
        embedded = self._embed(input_ids, inputs_embeds, None)
        states, new_hidden = self.run(embedded, hidden, padding_of(attention_mask, *embedded.shape[:2]))
        output = LSTMModelOutput(
            last_hidden_state=states[-1],
            hidden=None if use_cache is False else new_hidden,
            hidden_states=tuple(states) if _asked(output_hidden_states, self.config.output_hidden_states) else None,
        )
        return output if _asked(return_dict, self.config.return_dict) else cast(Any, output.to_tuple())


class LSTMForCausalLM(LSTMPreTrainedModel, HiddenGenerationMixin):
    """The LSTM language model. ``labels`` follow transformers: equal to ``input_ids``, shifted inside, -100 ignored."""

    _tied_weights_keys = {"lm_head.weight": "embedding.weight"}
    _is_stateful = True  # on the class itself: PreTrainedModel, which comes first, has another value

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.lm_head)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        hidden: Hidden | None = None,
        *,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **for_the_loss: Any,
    ) -> LSTMOutput:
        """``input_ids`` (B, T), or ``inputs_embeds`` (B, T, D); ``attention_mask`` (B, T) is 0 at padded places.

        ``targets`` (B, T), the token after each input: the loss is their mean nats and ``penalty``, and no logits are
        made, which is how ``dynlm train`` trains. ``logits_to_keep``: logits of the last places alone; 0 is all.
        ``num_items_in_batch``, as ``Trainer`` gives it when it accumulates gradients, divides the summed loss in place
        of this batch's targets.

        Raises:
            InputError: an argument of transformers that this model has no use for and must not ignore.
        """
        self._require_known(for_the_loss)
        link = self.link(input_ids, self.lm_head)
        embedded = self._embed(input_ids, inputs_embeds, link)
        padding = padding_of(attention_mask, *embedded.shape[:2])
        states, new_hidden = self.run(embedded, hidden, padding)
        dropped = locked_dropout(states[-1], self.config.output_dropout, self.training)
        kept, head = dropped[:, -logits_to_keep:], self.lm_head
        penalty = self._activation_penalty(dropped, states[-1], padding)
        if targets is not None:
            if padding is not None or labels is not None:
                raise InputError("targets stand for every place: give labels, -100 where padded, or targets alone")
            nats = mean_loss(dropped.flatten(0, 1), head.weight, head.bias, targets.flatten())
            return LSTMOutput(loss=nats + penalty, hidden=new_hidden, penalty=penalty)
        logits = read_out(kept[0], head.weight, head.bias, link)[None] if link else head(kept)
        output = LSTMOutput(
            loss=None if labels is None else self._loss(logits, labels, penalty, for_the_loss),
            logits=logits,
            hidden=None if use_cache is False else new_hidden,
            penalty=penalty,
            hidden_states=tuple(states) if _asked(output_hidden_states, self.config.output_hidden_states) else None,
        )
        return output if _asked(return_dict, self.config.return_dict) else cast(Any, output.to_tuple())

    def _require_known(self, given: dict[str, Any]) -> None:
        asked = {name for name, value in given.items() if value is not None and value is not False}
        unknown = sorted(asked - LOSS_ARGUMENTS)
        if unknown:
            raise InputError(
                f"{type(self).__name__} takes no {', '.join(unknown)}: it has neither positions nor attention, and "
                "its hidden state goes in and out as `hidden`"
            )

    def _loss(self, logits: Tensor, labels: Tensor, penalty: Tensor, settings: dict[str, Any]) -> Tensor:
        """Nats a target and the penalty, which counts once a target, so that micro-batches add up to their whole."""
        nats: Tensor = self.loss_function(logits, labels, logits.shape[-1], **settings)
        whole = settings.get("num_items_in_batch")
        if whole is None:
            return nats + penalty
        targets = labels[:, 1:] if settings.get("shift_labels") is None else settings["shift_labels"]
        share = (targets != settings.get("ignore_index", -100)).sum() / whole
        total: Tensor = nats + penalty * share
        return total

    def _activation_penalty(self, dropped: Tensor, raw: Tensor, padding: Padding | None) -> Tensor:
        """AR + TAR of arXiv:1708.02182, zero outside training; padded places do not count."""
        config, penalty = self.config, raw.new_zeros(())
        if self.training and config.activation_regularization:
            squares = dropped.square()
            mean = padding.mean(squares) if padding else squares.mean()
            penalty = penalty + config.activation_regularization * mean
        if self.training and config.temporal_activation_regularization and raw.shape[1] > 1:
            change = padding.mean_change(raw) if padding else raw.diff(dim=1).square().mean()
            penalty = penalty + config.temporal_activation_regularization * change
        return penalty


def _asked(argument: bool | None, configured: bool | None) -> bool:
    return bool(configured if argument is None else argument)


AutoConfig.register(LSTMConfig.model_type, LSTMConfig, exist_ok=True)
AutoModel.register(LSTMConfig, LSTMModel, exist_ok=True)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM, exist_ok=True)
AutoTokenizer.register(LSTMConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
# Trainer shifts the labels for label smoothing only where this table names the model, and pipelines look here too.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[LSTMConfig.model_type] = LSTMForCausalLM.__name__
