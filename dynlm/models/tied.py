"""One matrix as embedding and as read-out of one stream: its two gradients in one buffer.

Autograd adds the few rows that the embedding sends to the read-out's dense gradient out of place: a copy of the whole
matrix at every segment. The embedding's backward pass comes last, so the read-out leaves its gradient there, and the
rows are added to it in place. Same gradients (tests/models/test_tied.py), once differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Link:
    """Between the embedding and the read-out of one forward pass: the read-out's gradient of the matrix (V, D)."""

    gradient: Tensor | None = None


def embed(ids_T: Tensor, weight_VD: Tensor, link: Link) -> Tensor:
    """Return (T, D)."""
    return _Embedding.apply(ids_T, weight_VD, link)  # type: ignore[no-untyped-call, no-any-return]


def read_out(h_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, link: Link) -> Tensor:
    """Logits (T, V) of states that depend on what :func:`embed` gave with the same link."""
    return _ReadOut.apply(h_TD, weight_VD, bias_V, link)  # type: ignore[no-untyped-call, no-any-return]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_T: Tensor, weight_VD: Tensor, link: Link) -> Tensor:
        ctx.save_for_backward(ids_T)
        ctx.link, ctx.size = link, weight_VD.shape
        return weight_VD[ids_T]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        (ids_T,) = ctx.saved_tensors
        gradient, ctx.link.gradient = ctx.link.gradient, None
        if not ctx.needs_input_grad[1]:
            return None, None, None
        if gradient is None:
            gradient = grad_TD.new_zeros(ctx.size)
        return None, gradient.index_add_(0, ids_T, grad_TD), None


class _ReadOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, link: Link) -> Tensor:
        ctx.save_for_backward(h_TD, weight_VD)
        ctx.link = link
        return torch.addmm(bias_V, h_TD, weight_VD.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TV: Tensor) -> tuple[Tensor | None, ...]:
        h_TD, weight_VD = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            ctx.link.gradient = grad_TV.t() @ h_TD
        grad_h = grad_TV @ weight_VD if ctx.needs_input_grad[0] else None
        return grad_h, None, grad_TV.sum(0) if ctx.needs_input_grad[2] else None, None
