"""Mean loss of a read-out over many tokens without ever holding its logits.

Training reads thousands of tokens a step: their logits, as float32, are larger than everything else and go through
memory several times. Here a few hundred rows at a time become logits, softmax, loss and gradient while they are in the
cache. Same loss and gradients as ``cross_entropy(linear(h, W, b))`` to rounding (tests/models/test_readout.py), once
differentiable. As in Liger's fused linear cross entropy (arXiv:2410.10989), the gradient is taken in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 512  # logits in the making; from 256 to 1,024 the time hardly differs


def mean_loss(h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor) -> Tensor:
    """Mean nats per target of logits h Wᵀ + b; products in autocast's precision where it is on, else as they are."""
    kind = h_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h_ND.dtype
    return _MeanLoss.apply(h_ND, weight_VD, bias_V, targets_N, dtype)  # type: ignore[no-untyped-call, no-any-return]


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, dtype: torch.dtype
    ) -> Tensor:
        wide = torch.promote_types(h_ND.dtype, torch.float32)
        h, weight, bias = h_ND.to(dtype), weight_VD.to(dtype), bias_V.to(dtype)
        grad_h, grad_bias = torch.empty_like(h), torch.zeros_like(bias_V, dtype=wide)
        grad_weight, total = torch.zeros_like(weight_VD, dtype=wide), torch.zeros((), dtype=wide, device=h.device)
        share = 1 / targets_N.numel()
        for start in range(0, targets_N.numel(), ROWS):
            rows = slice(start, start + ROWS)
            target_R1 = targets_N[rows, None]
            logits_RV = torch.addmm(bias, h[rows], weight.t()).to(wide)
            logits_RV -= logits_RV.amax(1, keepdim=True)
            wanted_R1 = logits_RV.gather(1, target_R1)
            sums_R1 = logits_RV.exp_().sum(1, keepdim=True)
            total += (sums_R1.log() - wanted_R1).sum()
            logits_RV *= share / sums_R1  # now the gradient of the logits, but for the targets
            logits_RV.scatter_add_(1, target_R1, torch.full_like(sums_R1, -share))
            grad_RV = logits_RV.to(dtype)
            grad_h[rows] = grad_RV @ weight
            grad_weight += grad_RV.t() @ h[rows]
            grad_bias += logits_RV.sum(0)
        ctx.save_for_backward(grad_h, grad_weight, grad_bias)
        ctx.dtypes = h_ND.dtype, weight_VD.dtype, bias_V.dtype
        return total * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = (g.to(dtype).mul_(grad) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return (*grads, None, None)
