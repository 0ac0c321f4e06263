"""How ``generate`` of transformers carries the hidden state of a recurrent language model, beams included.

Between two tokens the state is kept where transformers keeps its caches, so that beam search reorders it with its
beams. What needs keys and values of every token is refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils import ModelOutput

from dynlm.models.core import Hidden
from dynlm.types import InputError

CARRIED: str = ALL_CACHE_NAMES[0]
"""what transformers calls that which beam search reorders: ``cache``, or ``past_key_values`` before release 5.24"""

PASSED = ("output_hidden_states", "output_attentions", "logits_to_keep")


class HiddenGenerationMixin(GenerationMixin):
    """Greedy search, sampling and beam search with ``forward(..., hidden=)``, which gives ``hidden`` back.

    ``generate(..., hidden=state)`` goes on from a state: all of ``input_ids`` is read after it.
    """

    _supported_generation_modes = ("greedy_search", "sample", "beam_search", "beam_sample")

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        hidden: Hidden | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        passed = {name: kwargs[name] for name in PASSED if name in kwargs}
        carried: Hidden | None = kwargs.get(CARRIED)
        if carried is not None:
            return {"input_ids": input_ids[:, -1:], "hidden": carried, **passed}
        text = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        batch = next(iter(text.values())).shape[0]
        return {**text, "attention_mask": attention_mask, "hidden": _expanded(hidden, batch), **passed}

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if model_kwargs.get("use_cache", True):
            model_kwargs[CARRIED] = outputs["hidden"]
        return model_kwargs

    def _reorder_cache(self, carried: Hidden, beam_idx: Tensor) -> Hidden:
        return tuple((h.index_select(0, beam_idx), c.index_select(0, beam_idx)) for h, c in carried)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """No cache of keys and values is made."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise InputError(
                f"{type(self).__name__} takes no cache_implementation {kind!r}: its hidden state is all it carries"
            )


def _expanded(hidden: Hidden | None, batch: int) -> Hidden | None:
    """Return each row as often as ``generate`` repeats the texts, for beams and for several sequences a text."""
    if not hidden or hidden[0][0].shape[0] == batch:
        return hidden
    times = batch // hidden[0][0].shape[0]
    return tuple((h.repeat_interleave(times, 0), c.repeat_interleave(times, 0)) for h, c in hidden)
