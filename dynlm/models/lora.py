"""Low-rank fast weights (LoRA, Hu et al. 2021, arXiv:2106.09685): W + (α / r) B A with B = 0 at the start."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dynlm.lazy import optional
from dynlm.models.params import matching
from dynlm.settings import WIDE, Bound, NotEmpty, Positive, Seed, Settings
from dynlm.types import InputError

LORA_PARAMS = ("*.lora_A.*", "*.lora_B.*")
"""globs of the low-rank weights, for ``read.params``"""


@dataclass(frozen=True)
class LoraSettings(Settings):
    """Which layers get low-rank weights, and how large these are."""

    rank: Annotated[int, Bound(0, WIDE)] = 8
    """columns of B and rows of A; in a recipe 0, the default there, is none"""
    alpha: Positive = 16.0
    """B A is scaled by alpha / rank"""
    targets: Annotated[tuple[str, ...], NotEmpty()] = ("*",)
    """globs on the names of linear layers; the output head is never one"""
    seed: Seed = 0
    """of A"""


def add_lora(model: PreTrainedModel, settings: LoraSettings | None = None) -> tuple[str, ...]:
    """Put low-rank weights beside the linear layers of ``model``, in place; its scores do not change yet.

    The trained weights are frozen. Returns the globs of the new weights, for ``read.params``.

    Raises:
        InputError: peft is not installed, a rank below 1, a glob that matches no linear layer, or a second call.
    """
    settings = settings or LoraSettings()
    with optional("a model with low-rank weights"):
        from peft import LoraConfig, inject_adapter_in_model
    if settings.rank < 1:
        raise InputError(f"the rank is {settings.rank}: expected 1 or more", setting="lora.rank")
    if any(".lora_A." in name for name, _ in model.named_parameters()):
        raise InputError(f"{type(model).__name__} has low-rank weights already: load it again")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a scale, used as it is
        target_modules=linear_layers(model, settings.targets),
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that it transposes GPT-2's layers as they need
        torch.manual_seed(settings.seed)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            message = f"peft refuses the targets {settings.targets} ({reason}): load it again"
            raise InputError(message, setting="lora.targets") from None
    return LORA_PARAMS


def linear_layers(model: PreTrainedModel, globs: tuple[str, ...]) -> list[str]:
    """Return names of the linear layers that match any glob, the output head left out."""
    head = model.get_output_embeddings()
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    if not names:
        raise InputError(f"{type(model).__name__} has no linear layer beside its head: it takes no low-rank weights")
    return matching(names, globs, "lora.targets", f"linear layer of {type(model).__name__}")


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model with its low-rank weights added to its own; the model itself where it has none."""
    if not any(".lora_A." in name for name, _ in model.named_parameters()):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    whole = copy.deepcopy(model)
    for name, module in list(whole.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, own = name.rpartition(".")
            setattr(whole.get_submodule(parent), own, module.get_base_layer())
    return whole
