"""The adapted parameters θ: chosen by globs, tied tensors counted once, each seen as a matrix."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn

from dynlm.types import InputError


class Adapted(NamedTuple):
    """One adapted tensor. ``matrix_RC`` shares its storage: writing to it changes the model."""

    name: str
    parameter: nn.Parameter

    @property
    def matrix_RC(self) -> Tensor:
        return as_matrix(self.parameter.detach())


def as_matrix(tensor: Tensor) -> Tensor:
    """A view with two axes: the first one, and all others together; a vector or scalar is one row."""
    return tensor.view(1, -1) if tensor.dim() < 2 else tensor.view(tensor.shape[0], -1)


def adapted_parameters(model: nn.Module, globs: Sequence[str] = ("*",)) -> list[Adapted]:
    """The parameters whose names match any glob, in the module's order, each shared tensor once.

    Raises:
        InputError: a glob that matches no parameter, or a parameter that is not contiguous floating point.
    """
    every = list(model.named_parameters(remove_duplicate=False))
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name, _ in every):
            names = [name for name, _ in every]
            close = difflib.get_close_matches(glob, names, n=1, cutoff=0.0)
            raise InputError(
                f"glob {glob!r} matches no parameter of {type(model).__name__}: did you mean {close[0]!r}?"
            )
    chosen: dict[int, Adapted] = {}
    for name, parameter in every:
        if id(parameter) not in chosen and any(fnmatchcase(name, glob) for glob in globs):
            if not parameter.is_floating_point() or not parameter.is_contiguous():
                raise InputError(
                    f"parameter {name!r} ({parameter.dtype}) is not contiguous floating point: leave it out"
                )
            chosen[id(parameter)] = Adapted(name, parameter)
    return list(chosen.values())
