"""Small networks to learn to optimise: those of the sampled training tasks, and three kept apart for held-out ones.

Language models map ids (B, S) to scores (B, S, V), image and vector networks (B, ...) to (B, outputs). Sampled tasks
have :class:`GRULanguageModel`, :class:`TransformerLanguageModel`, :class:`Perceptron`, :class:`Autoencoder` and
:class:`Convolutional`; held-out ones have :class:`LSTMLanguageModel`, :class:`Mixer` and :class:`Llama`, which no
sampled task uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlm.labs.general.gru import gru

Activation = Literal["relu", "tanh", "gelu"]
ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": lambda: nn.GELU(approximate="tanh"),  # the exact one takes several times as long on a CPU
}


class Perceptron(nn.Sequential):
    """Fully connected layers, (B, ...) flattened to (B, sizes[0]); LayerNorm, if any, before each activation."""

    def __init__(self, sizes: Sequence[int], activation: Activation = "relu", normalise: bool = False) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for n_in, n_out in pairwise(sizes):
            layers.append(nn.Linear(n_in, n_out))
            if normalise:
                layers.append(nn.LayerNorm(n_out))
            layers.append(ACTIVATIONS[activation]())
        super().__init__(*layers[: -2 if normalise else -1])


class Autoencoder(Perceptron):
    """(B, ...) to a code of ``code`` numbers and back to (B, inputs): encoder and decoder mirror each other."""

    def __init__(self, inputs: int, hidden: Sequence[int], code: int, activation: Activation = "relu") -> None:
        super().__init__([inputs, *hidden, code, *reversed(hidden), inputs], activation)


class Convolutional(nn.Module):
    """3×3 convolutions of stride 2, each with LayerNorm over the channels, if any, then the mean over all places.

    Images (B, 1, side, side) to class scores (B, ways). Channels come last.
    """

    def __init__(
        self, side: int, widths: Sequence[int], ways: int, activation: Activation = "relu", normalise: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([1, *widths]):
            layers += [_Patches(side, n_in), nn.Linear(9 * n_in, n_out)]
            if normalise:
                layers.append(nn.LayerNorm(n_out))
            layers.append(ACTIVATIONS[activation]())
            side = (side + 1) // 2
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], ways)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(images_BCHW).mean(1))
        return scores


class _Patches(nn.Module):
    """(B, side², C) or any view of it to the 3×3 patches at every other place, (B, ⌈side / 2⌉², 9 C), zeros outside.

    One gather and a linear layer are a convolution in a third of the time that torch's takes for a few channels.
    """

    def __init__(self, side: int, channels: int) -> None:
        super().__init__()
        numbers = torch.arange(side * side * channels).view(side, side, channels)
        padded = torch.full((side + 2, side + 2, channels), numbers.numel())  # the one zero, put behind all others
        padded[1:-1, 1:-1] = numbers
        patches = padded.unfold(0, 3, 2).unfold(1, 3, 2)  # (⌈side / 2⌉, ⌈side / 2⌉, C, 3, 3)
        self.register_buffer("index", patches.flatten(), persistent=False)
        self.size = 9 * channels

    def forward(self, x: Tensor) -> Tensor:
        flat_BN = F.pad(x.flatten(1), (0, 1))
        return flat_BN.index_select(1, self.get_buffer("index")).view(len(x), -1, self.size)


class GRULanguageModel(nn.Module):
    """Embedding, one GRU layer that starts at zero (Cho et al. 2014, arXiv:1406.1078), linear head."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.gates = nn.Linear(width, 3 * width)
        self.recurrent = nn.Parameter(nn.Linear(width, 3 * width, bias=False).weight.detach())
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids_BS: Tensor) -> Tensor:
        gates_SBG = self.gates(self.embedding(ids_BS.t()))
        scores: Tensor = self.head(gru(gates_SBG, self.recurrent)).transpose(0, 1)
        return scores


class TransformerLanguageModel(nn.Module):
    """Learned positions, causal blocks with LayerNorm first, ReLU of two widths; for sequences up to ``length``."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids_BS: Tensor) -> Tensor:
        n_steps = ids_BS.shape[1]
        x_ND = (self.embedding(ids_BS) + self.positions[:n_steps]).flatten(0, 1)  # one matrix: less work to call
        for block in self.blocks:
            x_ND = block(x_ND, n_steps)
        scores: Tensor = self.head(self.norm(x_ND)).view(*ids_BS.shape, -1)
        return scores


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x_ND: Tensor, n_steps: int) -> Tensor:
        width = x_ND.shape[1]
        parts = self.attend(self.norm_1(x_ND)).view(-1, n_steps, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_ND = x_ND + self.project(mixed.transpose(1, 2).reshape(-1, width))
        out: Tensor = x_ND + self.contract(F.relu(self.expand(self.norm_2(x_ND))))
        return out


class LSTMLanguageModel(nn.Module):
    """Embedding, ``layers`` of torch's LSTM from a zero state, linear head."""

    def __init__(self, vocabulary: int, width: int = 96, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids_BS: Tensor) -> Tensor:
        scores: Tensor = self.head(self.lstm(self.embedding(ids_BS))[0])
        return scores


class Mixer(nn.Module):
    """An MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601): images (B, 1, side, side) to class scores (B, ways)."""

    def __init__(self, side: int = 16, patch: int = 4, width: int = 64, layers: int = 3, ways: int = 26) -> None:
        super().__init__()
        n_patches = (side // patch) ** 2
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(_MixerBlock(n_patches, width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, ways)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BPD = self.blocks(self.patches(images_BCHW).flatten(2).transpose(1, 2))
        scores: Tensor = self.head(self.norm(x_BPD).mean(1))
        return scores


class _MixerBlock(nn.Module):
    def __init__(self, n_patches: int, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(n_patches, width // 2), nn.GELU(), nn.Linear(width // 2, n_patches))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_BPD: Tensor) -> Tensor:
        x_BPD = x_BPD + self.across(self.norm_1(x_BPD).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x_BPD + self.within(self.norm_2(x_BPD))
        return out


class Llama(nn.Module):
    """transformers' Llama with random weights, as a map from ids to scores."""

    def __init__(self, vocabulary: int, width: int = 64, layers: int = 2, heads: int = 4, length: int = 64) -> None:
        super().__init__()
        from transformers import (
            LlamaConfig,
            LlamaForCausalLM,
        )  # here: its import takes seconds, sampled tasks need none

        config = LlamaConfig(  # type: ignore[call-arg]  # what the class decorators of transformers add
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=length,
            attn_implementation="sdpa",
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, ids_BS: Tensor) -> Tensor:
        scores: Tensor = self.model(input_ids=ids_BS, use_cache=False).logits
        return scores
