"""Tiny models of every kind that transformers has, their scorers, priors and readers."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dynlm.data.segments import article_segments
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.models.causal import scorer_for
from dynlm.models.context import ContextConfig
from dynlm.models.lstm import ModelConfig
from dynlm.priors import measure_priors
from lab import START, VOCAB, make_article

POSITIONS, SEGMENT = 64, 8
WORDS = {"vocab_size": VOCAB, "bos_token_id": START, "eos_token_id": START, "initializer_range": 0.2}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ROPE = {**WORDS, **LAYERS, "num_key_value_heads": 1, "max_position_embeddings": POSITIONS, "pad_token_id": None}
GPT2 = {**WORDS, "n_positions": POSITIONS, "n_embd": 16, "n_layer": 2, "n_head": 2}
MAMBA = {**WORDS, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": None}
MODELS = {
    "lstm": lambda: ModelConfig(embedding_size=12, hidden_size=12).build(VOCAB, START, seed=1),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**ROPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**ROPE, head_dim=8, tie_word_embeddings=True)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**MAMBA)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**ROPE, sliding_window=12)),
}


def make_model(name):
    torch.manual_seed(1)
    return MODELS[name]().eval()


def make_scorer(name, carry="overlap", window=0):
    return scorer_for(make_model(name), ContextConfig(carry, window))


def pieces_of(article, segment=SEGMENT):
    return list(article_segments(article.ids_T, START, segment))


def priors_for(score, globs=("*",)):
    return measure_priors(score.model, score, iter(pieces_of(make_article(48, seed=9))), globs)


def reader_for(score, rule, priors, **config):
    return InnerLoop(score.model, score, rule, priors, ReadConfig(**{"segment": SEGMENT, "kernel": "eager", **config}))
