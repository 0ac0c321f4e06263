"""What ``dynlm read --model`` reads with: a ready model without a run, its prior measured now, and an untuned rule."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from dynlm.adapt import ReadConfig, make_priors, measure_priors
from dynlm.cli.adopt import load_base, load_ready_tokenizer, require_reads
from dynlm.cli.kit import Kit
from dynlm.data.segments import article_segments
from dynlm.data.stdlib import load_topics
from dynlm.data.texts import read_texts
from dynlm.data.tokenizers import Tokenizer, TokenizerConfig
from dynlm.meta.tune import search_space
from dynlm.models.causal import scorer_for
from dynlm.models.context import ContextConfig
from dynlm.models.lora import LoraSettings
from dynlm.models.params import adapted_parameters
from dynlm.optim.base import Prior, Rule
from dynlm.optim.library import make_rule
from dynlm.optim.registry import tuned
from dynlm.progress import Bar
from dynlm.types import Article, InputError, Piece

if TYPE_CHECKING:
    from dynlm.cli.read import ReadSettings

PRIOR_TOKENS = 256
CAUTION = 0.3
"""of the rate where tuning starts"""


def load_bare(settings: ReadSettings) -> Kit:
    """The kit of ``--model``: the model as it is, or with low-rank weights beside it.

    Raises:
        InputError: no whole model or tokenizer, a model that does not read, a rule that has to be trained, bad texts.
    """
    kind = settings.rule or "rms"
    if kind not in (*tuned(), "static"):
        known = f"choose {', '.join(tuned())} or static"
        raise InputError(f"--rule {kind} with --model: a learned rule belongs to the run it was trained in; {known}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context, lora = ContextConfig(carry=settings.carry), LoraSettings(rank=settings.lora_rank)
    try:
        model, params = load_base(settings.model, lora, ("*",), device)
        tokenizer, config = load_ready_tokenizer(settings.model, TokenizerConfig()), ReadConfig(params=params)
        score = require_reads(model, tokenizer, context, config.segment)
    except InputError as error:
        flags = (("set context.carry to ", "use --carry "), ("lora.rank", "--lora-rank"))
        raise InputError(_replaced(str(error), flags)) from None
    config = ReadConfig(reset=settings.resets, params=params)
    if kind == "static":  # which never asks for a gradient
        adapted = adapted_parameters(model, params)
        priors = make_priors(adapted, [torch.ones_like(a.matrix_RC) for a in adapted])
    else:
        pieces = list(_pieces(_prior_articles(settings.prior_text), tokenizer, config.segment, device))
        with Bar(len(pieces), "prior", "segment") as bar:
            priors = measure_priors(model, score, bar.over(pieces), params)
    rule = _rule(kind, settings.lr, priors).requires_grad_(False).to(device)
    return Kit(
        model,
        lambda m: scorer_for(m, context),
        tokenizer,
        rule,
        priors,
        config,
        f"{settings.model}, untuned",
        carry=settings.carry,
    )


def _replaced(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def _prior_articles(names: tuple[str, ...]) -> Iterator[Article]:
    if names:
        return (text.article() for text in read_texts(names))
    topics = load_topics()
    if not topics:
        raise InputError("this Python carries no documentation: name a text to measure the prior on (--prior-text)")
    print("dynlm: note: prior measured on Python's documentation; --prior-text names better text", file=sys.stderr)
    return iter(topics)


def _pieces(articles: Iterator[Article], tokenizer: Tokenizer, segment: int, device: torch.device) -> Iterator[Piece]:
    """The first segments of the articles, ``PRIOR_TOKENS`` in all."""
    encoded = (torch.tensor(tokenizer.encode(article.text), device=device) for article in articles)
    pieces = (piece for ids_T in encoded for piece in article_segments(ids_T, tokenizer.eos_id, segment))
    return itertools.islice(pieces, PRIOR_TOKENS // segment)


def _rule(kind: str, lr: float, priors: Sequence[Prior]) -> Rule:
    """A hand-made rule at the settings where tuning starts, with a rate below it, as nothing checks it here."""
    if kind == "static":
        return make_rule(kind)
    settings = {name: r.start for name, r in search_space(kind, priors).items()}
    return make_rule(kind, **settings | {"lr": lr or CAUTION * settings["lr"]})
