"""Base models as scorers: losses of a segment, hidden state in and out. Our LSTM, and any causal model of transformers.

A scorer reads one article segment by segment and scores each token once, given only tokens before it. ``inputs_S`` are
the tokens before ``targets_S``; the first of an article is the tokenizer's start token.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from dynlm.data.tokenizers import GGUF, gguf_in
from dynlm.files import tensor_kinds
from dynlm.models.context import (
    ContextConfig,
    FrozenCache,
    freeze,
    grows,
    is_recurrent,
    kept_when_updated,
    positions,
    recurrent_states,
    thaw,
)
from dynlm.models.core import LSTMScorer, require_float
from dynlm.models.lstm import LSTMForCausalLM
from dynlm.types import InputError

CacheState = tuple[Tensor, FrozenCache | None]
"""(ids of the tokens in the cache, where these are needed again; the cache)"""

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""what ``forward`` calls its cache: since transformers 5.24, before, and of recurrent models before"""
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
PROBE = 8  # tokens


class CausalScorer:
    """Scores segments of one article with any causal language model of transformers; ``ContextConfig`` says what it
    sees of the text before.

    The hidden state is None before the first segment. ``overlap``: the ids of the tokens before, and gradients flow
    through them under the present weights. ``cache``: (ids in the cache, cache as nested tuples), detached, so that
    gradients stay within the segment; when the window is full, its last half is read anew from position 0, which
    every kind of position encoding allows. Recurrent states are carried token by token, as models of transformers
    start a longer text from zero. ``none``: nothing.

    Raises:
        InputError: a window or segment longer than the model's positions, a model that sees later tokens, one with
            quantised layers, or one whose cache cannot be carried.
    """

    def __init__(self, model: PreTrainedModel, config: ContextConfig | None = None) -> None:
        require_float(model)
        self.model, self.config = model, config or ContextConfig()
        self.name = type(model).__name__
        self.window = self.config.tokens(model)
        unwrap = getattr(model, "get_base_model", lambda: model)  # of peft's wrapper
        self.accepted = set(inspect.signature(unwrap().forward).parameters)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                logits_TV = self._require_causal()
                if self.config.carry == "cache":
                    self._require_cache(logits_TV)
        finally:
            model.train(was_training)

    def __call__(self, inputs_S: Tensor, targets_S: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        modes: dict[str, Callable[[Tensor, Any], tuple[Tensor, Any]]]
        modes = {"overlap": self._overlapping, "cache": self._continued, "none": self._alone}
        logits_SV, hidden = modes[self.config.carry](inputs_S, hidden)
        if logits_SV.dtype in (torch.float16, torch.bfloat16):
            logits_SV = logits_SV.float()
        return F.cross_entropy(logits_SV, targets_S, reduction="none"), hidden

    def _alone(self, inputs_S: Tensor, hidden: None) -> tuple[Tensor, None]:
        size = inputs_S.numel()
        self._require_fit(size, self.config.window or positions(self.model) or size)
        return self._forward(inputs_S, size), None

    def _overlapping(self, inputs_S: Tensor, before_T: Tensor | None) -> tuple[Tensor, Tensor]:
        size = inputs_S.numel()
        self._require_fit(size, self.window)
        ids_T = inputs_S if before_T is None else torch.cat([_last(before_T, self.window - size), inputs_S])
        return self._forward(ids_T, size), _last(ids_T, self.window - 1)  # the next segment has a token at the least

    def _continued(self, inputs_S: Tensor, hidden: CacheState | None) -> tuple[Tensor, CacheState]:
        size = inputs_S.numel()
        ids_T, frozen = hidden or (inputs_S[:0], None)
        if self.grows:
            self._require_fit(size, self.window)
            if ids_T.numel() + size > self.window:
                ids_T, frozen = self._read_anew(_last(ids_T, min(self.window // 2, self.window - size)))
        cache = thaw(frozen, self.model)
        if frozen is None or not self.recurrent:
            logits_SV = self._forward(inputs_S, size, cache)
        else:
            with kept_when_updated(recurrent_states(cache)):
                logits_SV = torch.cat([self._forward(token, 1, cache) for token in inputs_S.split(1)])
        return logits_SV, (torch.cat([ids_T, inputs_S]) if self.grows else ids_T, freeze(cache))

    def _read_anew(self, ids_T: Tensor) -> CacheState:
        if not ids_T.numel():
            return ids_T, None
        cache = thaw(None, self.model)
        with torch.no_grad():
            self._forward(ids_T, 1, cache)
        return ids_T, freeze(cache)

    def _forward(self, ids_T: Tensor, size: int, cache: Any = None) -> Tensor:
        """Return (size, V) logits of the last tokens; ``cache`` moves on behind them."""
        arguments: dict[str, Any] = {}
        if "use_cache" in self.accepted:
            arguments["use_cache"] = cache is not None
        if "logits_to_keep" in self.accepted:
            arguments["logits_to_keep"] = size
        if cache is not None:
            arguments[next((name for name in CACHE_NAMES if name in self.accepted), CACHE_NAMES[0])] = cache
        logits_SV: Tensor = cast(Any, self.model)(ids_T[None], **arguments).logits[0, -size:]
        return logits_SV

    def _require_fit(self, size: int, bound: int) -> None:
        if size > bound:
            raise InputError(
                f"a segment of {size} tokens does not fit into {bound} of context ({self.name} has "
                f"{positions(self.model) or 'no bound of'} positions): shorten the segment, or widen the window",
                setting="read.segment",
            )

    def _require_causal(self) -> Tensor:
        """Logits of a few tokens, none of which sees the last one. Makes a leak an error, not a low perplexity."""
        n = min(PROBE, positions(self.model) or PROBE)
        vocab = cast(Any, self.model.get_input_embeddings()).weight.shape[0]
        self.probe_T = torch.arange(n, device=self.model.device) % vocab
        other_T = torch.cat([self.probe_T[:-1], (self.probe_T[-1:] + 1) % vocab])
        logits_TV, other_TV = self._forward(self.probe_T, n), self._forward(other_T, n)
        if _differ(logits_TV[:-1], other_TV[:-1], 1e-4):
            raise InputError(f"{self.name} sees later tokens: reading needs a causal model (is_decoder=True for BERT)")
        return logits_TV

    def _require_cache(self, logits_TV: Tensor) -> None:
        """What this model carries, tried on a few tokens against one pass over them."""
        try:
            empty = thaw(None, self.model)
            self.grows, self.recurrent = grows(empty), is_recurrent(empty)
            first_T, second_T = self.probe_T[: self.window].tensor_split(2)
            hidden = self._continued(first_T, None)[1]
            self._continued(first_T.flip(0), None)  # another text, which what is carried must not notice
            carried_TV, _ = self._continued(second_T, hidden)
            agrees = not _differ(carried_TV, logits_TV[first_T.numel() :][: second_T.numel()], 1e-3)
        except Exception as error:  # models raise many kinds; all mean that their cache is not what DynamicCache holds
            reason = str(error).strip().splitlines() or [type(error).__name__]
            message = f"{self.name} carries no cache ({reason[0]}): set carry to 'overlap'"
            raise InputError(message, setting="context.carry") from None
        if not agrees:
            message = f"{self.name} gives other scores when it goes on from its cache: set carry to 'overlap'"
            raise InputError(message, setting="context.carry")


def _last(ids_T: Tensor, n: int) -> Tensor:
    return ids_T[max(0, ids_T.numel() - n) :]


def _differ(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """By more than ``tolerance`` times the largest; half precision is allowed more."""
    allowed = tolerance if a.dtype in (torch.float32, torch.float64) else 50 * tolerance
    return bool((a - b).abs().max() > allowed * b.abs().max())


def scorer_for(model: PreTrainedModel, config: ContextConfig | None = None) -> LSTMScorer | CausalScorer:
    """Return the scorer that fits a model: our LSTM carries its own state, and any other model what ``config`` says."""
    return LSTMScorer(model) if isinstance(model, LSTMForCausalLM) else CausalScorer(model, config)


def load_model(
    source: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, download: bool = False
) -> PreTrainedModel:
    """Load a base model, in evaluation mode.

    Args:
        source: a folder of ``dynlm train`` or ``save_pretrained``, a ``.gguf`` file, or a causal model of the hub.
        device: where its weights go.
        dtype: of its weights; None keeps float32 and makes float32 of half precision, where small updates would be
            rounded away.
        download: allow a download; without it, and always with ``HF_HUB_OFFLINE=1``, the hub's cache must hold it.

    Raises:
        InputError: a missing, truncated or foreign model folder; a hub name that is not cached.
    """
    folder = Path(source)
    is_hub = isinstance(source, str) and not folder.exists() and HUB_NAME.fullmatch(source) is not None
    is_gguf = folder.suffix == GGUF and folder.is_file()
    if not is_hub and not is_gguf and not (folder / "config.json").is_file():
        advice = "run `dynlm train` first" if isinstance(source, Path) else "give one of save_pretrained, or a hub name"
        raise InputError(f"{folder} holds no model (config.json): {advice}")
    if (folder / "adapter_config.json").is_file() and find_spec("peft") is None:
        raise InputError(f"{folder} holds an adapter, which needs peft: install dynlm[lora]")
    local: dict[str, Any] = {"local_files_only": not (is_hub and download)}
    place, within = gguf_in(source) if is_gguf else (source, {})
    try:
        model, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            place, trust_remote_code=False, output_loading_info=True, adapter_kwargs=local, **local, **within
        )
    except Exception as error:  # the loader raises many kinds; all mean that this is not a whole model
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if is_hub:
            raise InputError(
                f"{source} is no folder, and no hub model of that name is on this machine ({reason}): give a folder, "
                f"or fetch it with `hf download {source}`"
            ) from None
        raise InputError(f"{folder} is not a whole model ({reason}): train it again") from None
    if info["missing_keys"]:
        lacking = ", ".join(sorted(info["missing_keys"])[:3])
        raise InputError(f"{source} is not a whole model (it lacks {lacking}): train it again, or save a causal model")
    if not is_hub and not is_gguf:
        _require_real_weights(folder, model)
    if dtype is None and model.dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    placed: PreTrainedModel = (model if dtype is None else model.to(dtype)).to(device).eval()
    return placed


def _require_real_weights(folder: Path, model: PreTrainedModel) -> None:
    """Refuse whole, logical or complex numbers where the model has real weights: transformers casts them unasked."""
    weights = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for path in sorted(folder.glob("*.safetensors")):
        for name, kind in tensor_kinds(path).items():
            if name in weights and not kind.startswith(("F", "BF")):
                raise InputError(f"{path}: {name!r} is {kind}, expected floating point: train or save it again")
