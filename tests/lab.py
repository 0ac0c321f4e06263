"""Small real pieces that many tests share: a text to read, a tied LSTM and a transformer, their scorers and priors."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from dynlm.data.segments import article_segments
from dynlm.models.core import LSTMScorer
from dynlm.models.lstm import ModelConfig
from dynlm.priors import measure_priors
from dynlm.types import TokenizedArticle

VOCAB, START = 23, 0
needs_compiler = pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="no C compiler")


def make_article(n_tokens, seed=0, id="a"):
    """Token ids with repeated phrases, so that there is something to learn while reading."""
    generator = torch.Generator().manual_seed(seed)
    phrases = torch.randint(1, VOCAB, (4, 6), generator=generator)
    order = torch.randint(4, (n_tokens // 6 + 1,), generator=generator)
    return TokenizedArticle(id, id, phrases[order].flatten()[:n_tokens], n_words=n_tokens, n_bytes=3 * n_tokens)


class TransformerScorer:
    """Scores each segment alone: nothing is carried, so the segment must fit the model's positions."""

    def __init__(self, model):
        self.model = model

    def __call__(self, inputs_S, targets_S, hidden):
        return F.cross_entropy(self.model(inputs_S[None]).logits[0], targets_S, reduction="none"), None


def make_lab(dtype=torch.float64, layers=1):
    """(model, scorer, priors) of a random tied LSTM."""
    model = ModelConfig(embedding_size=6, hidden_size=7, layers=layers).build(VOCAB, START, seed=1).to(dtype).eval()
    score = LSTMScorer(model)
    pieces = article_segments(make_article(120, seed=9).ids_T, START, 8)
    return model, score, measure_priors(model, score, pieces)


def make_transformer_lab(dtype=torch.float64, positions=16):
    """(model, scorer, priors) of a random GPT-2 with tied embeddings."""
    size = {"vocab_size": VOCAB, "n_positions": positions, "n_embd": 8, "n_layer": 1, "n_head": 2}
    words = {"bos_token_id": START, "eos_token_id": START}
    config = GPT2Config(**size, **words, initializer_range=0.1, attn_implementation="sdpa")
    torch.manual_seed(1)
    model = GPT2LMHeadModel(config).to(dtype).eval()
    score = TransformerScorer(model)
    pieces = article_segments(make_article(120, seed=9).ids_T, START, 8)
    return model, score, measure_priors(model, score, pieces)
