"""Priors: what is known of each adapted tensor before reading, θ0 and the static RMS of the gradient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynlm.inner import Scorer, detach
from dynlm.models.params import Adapted, adapted_parameters, as_matrix, matched_parameters
from dynlm.optim.base import Prior
from dynlm.types import InputError


def measure_priors(
    model: nn.Module, score: Scorer, pieces: Iterator[tuple[Tensor, Tensor]], globs: Sequence[str] = ("*",)
) -> list[Prior]:
    """θ0 and the static RMS of the segment gradient, sqrt(mean g²) a weight, over ``pieces`` of training text.

    The hidden state is carried from piece to piece. Weights that never saw a gradient have RMS 0. Frozen parameters are
    left out, with a warning.
    """
    adapted = adapted_parameters(model, globs)
    frozen = [a.name for a in matched_parameters(model, globs) if not a.parameter.requires_grad]
    if frozen:
        warnings.warn(f"{len(frozen)} frozen parameters are not adapted, such as {frozen[0]!r}", stacklevel=2)
    squares = [torch.zeros_like(a.matrix_RC) for a in adapted]
    hidden: Any = None
    n_pieces = 0
    was_training = model.training
    model.eval()
    for inputs_S, targets_S in pieces:
        n_pieces += 1
        losses_S, hidden = score(inputs_S, targets_S, hidden)
        hidden = detach(hidden)
        grads = torch.autograd.grad(losses_S.mean(), [a.parameter for a in adapted], materialize_grads=True)
        for square, grad in zip(squares, map(Tensor.contiguous, grads), strict=True):
            square.addcmul_(as_matrix(grad), as_matrix(grad))
    model.train(was_training)
    if n_pieces == 0:
        raise InputError("no text to measure the static RMS of the gradient on: the train split is empty")
    return make_priors(adapted, [square.div_(n_pieces).sqrt_() for square in squares])


def make_priors(adapted: Sequence[Adapted], rms: Sequence[Tensor]) -> list[Prior]:
    """Priors from the model's present weights and given RMS matrices.

    A tensor without any gradient, as LoRA's A while B is 0, gets the mean RMS of the others: rules divide by it.
    """
    means = [float(r.mean()) for r in rms]
    known = [m for m in means if m != 0]
    mean = sum(known) / max(1, len(known))
    if not math.isfinite(mean) or mean <= 0:
        raise InputError(f"the static RMS of the gradient averages {mean}: the model learns nothing from this text")
    rms = [r if m else torch.full_like(r, mean) for r, m in zip(rms, means, strict=True)]
    means = [m or mean for m in means]
    return [
        Prior(a.name, a.matrix_RC.clone(), r.to(a.matrix_RC), m, 1 / mean)
        for a, r, m in zip(adapted, rms, means, strict=True)
    ]
