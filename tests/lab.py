"""Small real pieces that many tests share: a text to read, a tied LSTM, its scorer and priors."""

import torch

from dynlm.adapt import measure_priors
from dynlm.data.segments import article_segments
from dynlm.models.causal import LSTMScorer
from dynlm.models.lstm import ModelConfig
from dynlm.types import TokenizedArticle

VOCAB, START = 23, 0


def make_article(n_tokens, seed=0, id="a"):
    """Token ids with repeated phrases, so that there is something to learn while reading."""
    generator = torch.Generator().manual_seed(seed)
    phrases = torch.randint(1, VOCAB, (4, 6), generator=generator)
    order = torch.randint(4, (n_tokens // 6 + 1,), generator=generator)
    return TokenizedArticle(id, id, phrases[order].flatten()[:n_tokens], n_words=n_tokens, n_bytes=3 * n_tokens)


def make_lab(dtype=torch.float64, layers=1):
    """(model, scorer, priors) of a random tied LSTM."""
    model = ModelConfig(embedding_size=6, hidden_size=7, layers=layers).build(VOCAB, START, seed=1).to(dtype).eval()
    score = LSTMScorer(model)
    pieces = article_segments(make_article(120, seed=9).ids_T, START, 8)
    return model, score, measure_priors(model, score, pieces)
