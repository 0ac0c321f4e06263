"""The session of a ready model without a run: its prior is measured now, and its rules are untuned.

They are the hand-made ones, and the learned rule that ships: it knows tensors by their kind, not by their names, and
moves away from the untuned RMS rule of the model at hand.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from dynlm.data.stdlib import load_topics
from dynlm.data.texts import read_texts
from dynlm.data.tokenizers import TokenizerConfig, as_tokenizer
from dynlm.inner import ReadConfig
from dynlm.meta.tune import search_space
from dynlm.models.causal import scorer_for
from dynlm.models.context import ContextConfig
from dynlm.models.lora import LoraSettings
from dynlm.models.ready import EVERYTHING, load_base, load_ready_tokenizer, require_reads
from dynlm.optim.base import Prior, Rule
from dynlm.optim.hub import load_learned
from dynlm.optim.library import make_rule
from dynlm.optim.registry import tuned
from dynlm.session.prior import measured
from dynlm.session.session import RULES, Session
from dynlm.types import Article, InputError

PRIOR_TOKENS = 256
CAUTION = 0.3
"""of the rate where tuning starts"""
log = logging.getLogger("dynlm")


def ready_session(
    source: str | Path, *, lora_rank: int = 0, params: tuple[str, ...] = EVERYTHING, **more: Any
) -> Session:
    """Return the session of a folder or hub name of a causal language model, or with low-rank weights beside it.

    ``more``: what :func:`given_session` takes.

    Raises:
        InputError: no whole model or tokenizer, a model that does not read, bad texts.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, params = load_base(source, LoraSettings(rank=lora_rank), params, device)
    tokenizer = load_ready_tokenizer(str(source), TokenizerConfig())
    return given_session(model, tokenizer, params=params, source=str(source), **more)


def given_session(
    model: PreTrainedModel,
    tokenizer: object,
    *,
    reset: Literal["article", "never"] = "article",
    segment: int = ReadConfig.segment,
    params: tuple[str, ...] = EVERYTHING,
    carry: Literal["cache", "overlap", "none"] = "cache",
    prior_text: Sequence[str] = (),
    source: str = "",
) -> Session:
    """Return the session of a model in memory; its prior is measured when it is first needed.

    ``tokenizer`` is one of transformers, or a :class:`Tokenizer` of ours. ``prior_text`` names files that the prior is
    measured on, without any Python's documentation.

    Raises:
        InputError: a tokenizer that is not the model's, a model that does not read, bad texts.
    """
    own, context = as_tokenizer(tokenizer), ContextConfig(carry=carry)
    config = ReadConfig(segment=segment, reset=reset, params=params)
    score = require_reads(model, own, context, segment)
    texts = read_texts(prior_text) if prior_text else None  # names are looked at now

    def priors() -> list[Prior]:
        articles = _documentation() if texts is None else (text.article() for text in texts)
        return measured(model, score, articles, own, config, PRIOR_TOKENS)

    name = source or model.name_or_path or type(model).__name__
    session = Session(model, lambda m: scorer_for(m, context), own, priors, config, source=f"{name}, untuned")
    session.carry = carry
    return session


def untuned_rule(kind: str, session: Session, lr: float = 0.0) -> Rule:
    """Return a rule at the settings where tuning starts, with a rate below it, as nothing checks it here.

    ``gated`` is the learned rule that ships, over the RMS rule of these settings.

    Raises:
        InputError: a rule that has to be trained.
    """
    if kind not in untuned():
        known = ", ".join(untuned())
        message = f"rule {kind} without a run has to be trained in one first: choose one of {known}"
        raise InputError(message, setting="rule")
    if kind == "static":
        return make_rule(kind)
    learned = kind == "gated"
    space = search_space("rms" if learned else kind, session.priors)
    settings = {name: r.start for name, r in space.items()}
    settings["lr"] = lr or CAUTION * settings["lr"]
    rule = load_learned("reader", kind, settings) if learned else make_rule(kind, **settings)
    return rule.to(session.device)


def best_untuned(session: Session) -> str:
    """Return the rule that a model without a run is read with: the first that a run would be."""
    return RULES[session.config.reset][0]


def untuned() -> list[str]:
    """Return the rules that read with a model for which nothing was tuned."""
    return ["gated", *tuned(), "static"]


def _documentation() -> Iterable[Article]:
    topics = load_topics()
    if not topics:
        message = "this Python carries no documentation: name a text to measure the prior on"
        raise InputError(message, setting="prior_text")
    log.info("prior measured on Python's documentation; prior_text names better text")
    return topics
