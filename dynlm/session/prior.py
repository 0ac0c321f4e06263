"""The prior of a session's model: measured on the first tokens of some texts, or read from a run directory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dynlm.data.segments import article_segments
from dynlm.data.tokenizers import Tokenizer
from dynlm.files import Json, read_tensors, require_layout
from dynlm.inner import ReadConfig, Scorer
from dynlm.models.params import Adapted
from dynlm.optim.base import Prior
from dynlm.priors import measure_priors
from dynlm.progress import Bar
from dynlm.types import Article


def measured(
    model: nn.Module, score: Scorer, articles: Iterable[Article], tokenizer: Tokenizer, config: ReadConfig, tokens: int
) -> list[Prior]:
    """Measure θ0 and its static RMS on the first ``tokens`` tokens of the articles, and on one segment at the least."""
    device = next(model.parameters()).device
    encoded = (torch.tensor(tokenizer.encode(article.text), device=device) for article in articles)
    pieces = (piece for ids_T in encoded for piece in article_segments(ids_T, tokenizer.start_id, config.segment))
    first = list(itertools.islice(pieces, max(1, tokens // config.segment)))
    with Bar(len(first), "static RMS of the gradient", "segment") as bar:
        return measure_priors(model, score, bar.over(first), config.params)


def read_prior(path: Path, adapted: Sequence[Adapted]) -> tuple[list[Tensor], Json]:
    """Return the static RMS of each adapted parameter, and how it was measured.

    Raises:
        InputError: numbers of other parameters, or that no RMS can be.
    """
    tensors, measured = read_tensors(path)
    layout = {a.name: a.matrix_RC for a in adapted}
    require_layout(path, tensors, layout, least=0.0, advice=": run `dynlm tune` again, with the same read.params")
    return [tensors[a.name].to(a.matrix_RC) for a in adapted], measured
