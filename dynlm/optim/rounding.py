"""Rounding of a rule's state to bfloat16: up or down at random, so that slow averages are right in the mean.

To nearest, an average that moves by less than 1/256 of itself a step would never move at all (stochastic rounding;
Gupta et al. 2015, arXiv:1502.02551). The noise is a hash of step, tensor, slot and coordinate, so runs repeat bitwise;
the kernels of dynlm.optim.source have the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def rounded(new: Tensor, dtype: torch.dtype, step: int, number: int, place: int) -> Tensor:
    """Return slot ``place`` of tensor ``number`` as ``dtype``, after step ``step``."""
    if dtype != torch.bfloat16 or new.dtype != torch.float32:
        return new.to(dtype)
    seed = (step * 0x9E3779B1 + number * 0x85EBCA77 + place * 0xC2B2AE3D) & MASK
    bits = new.contiguous().view(torch.int32).to(torch.int64) & MASK
    noise = _hash(torch.arange(new.numel(), device=new.device).view(new.shape), seed) & 0xFFFF
    up = ((bits + noise) & MASK) >> 16 << 16
    up = torch.where(up > MASK >> 1, up - MASK - 1, up).to(torch.int32).view(torch.float32)
    return torch.where(new.isfinite(), up, new).to(dtype)


def _hash(i: Tensor, seed: int) -> Tensor:
    """Return a well mixed 32-bit number for each of ``i``, in 64-bit integers."""
    x = (i * 0x9E3779B9 + seed) & MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    return x ^ (x >> 13)
