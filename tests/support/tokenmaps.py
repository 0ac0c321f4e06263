"""A small map of tokens, for the page of ``dynlm read``."""

from __future__ import annotations

import torch

from dynlm.report.tokenmap import TokenMap

ARTICLES = [("One & <two>", 0), ("Second", 4)]
TEXTS = ["A <b>", " tail &amp;", "\r", "\n", " \u65e5", "", "\u200b", "\n"]


WORDS = [
    {"word": "Quern<moor", "times": 6, "static": [39.7, 39.66, 42.2], "adapted": [39.7, 39.7, 8.49]},
    {"word": "charter", "times": 2, "static": [10.5, 9.79], "adapted": [10.7, 8.08]},
]
MEAN = {"words": 3, "static": [35.2, 37.2, 36.7], "adapted": [35.2, 31.9, 11.3]}


def make_map(texts=TEXTS, articles=ARTICLES, static_perplexity=None, **words):
    static_T = torch.linspace(0, 6, len(texts)).tolist()
    adapted_T = torch.linspace(3, 3, len(texts)).tolist()
    totals = {"articles": len(articles), "tokens": len(texts), "words": 4, "lines": 2, "bytes": 99, "seconds": 1.0}
    for name, nats, perplexity in (("static", sum(static_T), static_perplexity), ("adapted", sum(adapted_T), 12.5)):
        figures = {"nats_per_token": nats / len(texts), "bits_per_byte": nats / 99, "word_perplexity": perplexity}
        totals[name] = figures
    settings = {"model": "runs/x", "fingerprint of the model": "0123abcd", "rule: lr": 0.002}
    return TokenMap("gated", articles, texts, static_T, adapted_T, totals, settings, **words)
