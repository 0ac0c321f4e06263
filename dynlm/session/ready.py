"""The session of a ready model without a run: its prior is measured now, and its rules are hand-made and untuned."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from dynlm.adapt import ReadConfig, make_priors, measure_priors
from dynlm.data.segments import article_segments
from dynlm.data.stdlib import load_topics
from dynlm.data.texts import read_texts
from dynlm.data.tokenizers import Tokenizer, TokenizerConfig, as_tokenizer
from dynlm.meta.tune import search_space
from dynlm.models.causal import scorer_for
from dynlm.models.context import ContextConfig
from dynlm.models.lora import LoraSettings
from dynlm.models.params import adapted_parameters
from dynlm.models.ready import EVERYTHING, load_base, load_ready_tokenizer, require_reads
from dynlm.optim.base import Prior, Rule
from dynlm.optim.library import make_rule
from dynlm.optim.registry import tuned
from dynlm.progress import Bar
from dynlm.session.session import Session
from dynlm.types import Article, InputError, Piece

PRIOR_TOKENS = 256
CAUTION = 0.3
"""of the rate where tuning starts"""
log = logging.getLogger("dynlm")


def ready_session(
    source: str | Path,
    *,
    reset: Literal["article", "never"] = "article",
    segment: int = ReadConfig.segment,
    params: tuple[str, ...] = EVERYTHING,
    carry: Literal["cache", "overlap", "none"] = "cache",
    lora_rank: int = 0,
    prior_text: Sequence[str] = (),
    learns: bool = True,
) -> Session:
    """Return the session of a folder or hub name of a causal language model, or with low-rank weights beside it.

    ``prior_text`` names files that the prior is measured on, without any Python's documentation; where nothing
    ``learns`` it is not measured.

    Raises:
        InputError: no whole model or tokenizer, a model that does not read, bad texts.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, params = load_base(source, LoraSettings(rank=lora_rank), params, device)
    tokenizer = load_ready_tokenizer(str(source), TokenizerConfig())
    config = ReadConfig(segment=segment, reset=reset, params=params)
    return given_session(
        model, tokenizer, config, carry=carry, prior_text=prior_text, learns=learns, source=f"{source}, untuned"
    )


def given_session(
    model: PreTrainedModel,
    tokenizer: object,
    config: ReadConfig | None = None,
    *,
    carry: Literal["cache", "overlap", "none"] = "cache",
    prior_text: Sequence[str] = (),
    learns: bool = True,
    source: str = "",
) -> Session:
    """Return the session of a model in memory; its prior is measured when it is first needed.

    ``tokenizer`` is one of transformers, or a :class:`Tokenizer` of ours.

    Raises:
        InputError: a tokenizer that is not the model's, a model that does not read.
    """
    own, config, context = as_tokenizer(tokenizer), config or ReadConfig(), ContextConfig(carry=carry)
    source = source or f"{model.name_or_path or type(model).__name__}, untuned"
    score = require_reads(model, own, context, config.segment)
    articles = _prior_articles(prior_text) if learns else iter(())

    def priors() -> list[Prior]:
        adapted = adapted_parameters(model, config.params)
        if not learns:  # nothing will ever ask for a gradient
            return make_priors(adapted, [torch.ones_like(a.matrix_RC) for a in adapted])
        pieces = list(_pieces(articles, own, config.segment, model.device))
        with Bar(len(pieces), "prior", "segment") as bar:
            return measure_priors(model, score, bar.over(pieces), config.params)

    session = Session(model, lambda m: scorer_for(m, context), own, priors, config, source=source)
    session.carry = context.carry
    return session


def untuned_rule(kind: str, session: Session, lr: float = 0.0) -> Rule:
    """Return a hand-made rule at the settings where tuning starts, with a rate below it, as nothing checks it here.

    Raises:
        InputError: a rule that has to be trained.
    """
    if kind not in (*tuned(), "static"):
        known = f"choose {', '.join(tuned())} or static"
        raise InputError(f"rule {kind} without a run: a learned rule belongs to the run it was trained in; {known}")
    if kind == "static":
        return make_rule(kind)
    settings = {name: r.start for name, r in search_space(kind, session.priors).items()}
    return make_rule(kind, **settings | {"lr": lr or CAUTION * settings["lr"]}).to(session.device)


def _prior_articles(names: Sequence[str]) -> Iterator[Article]:
    if names:
        return (text.article() for text in read_texts(names))
    topics = load_topics()
    if not topics:
        raise InputError("this Python carries no documentation: name a text to measure the prior on (prior_text)")
    log.warning("prior measured on Python's documentation; prior_text names better text")
    return iter(topics)


def _pieces(articles: Iterator[Article], tokenizer: Tokenizer, segment: int, device: torch.device) -> Iterator[Piece]:
    """Return the first segments of the articles, ``PRIOR_TOKENS`` in all."""
    encoded = (torch.tensor(tokenizer.encode(article.text), device=device) for article in articles)
    pieces = (piece for ids_T in encoded for piece in article_segments(ids_T, tokenizer.start_id, segment))
    return itertools.islice(pieces, PRIOR_TOKENS // segment)
