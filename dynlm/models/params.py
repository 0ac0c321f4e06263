"""Parameter pointers, and the adapted parameters θ: chosen by globs, tied tensors counted once, each seen as a matrix.

An unrolled optimizer needs θ_t as a node of a graph where the model holds an ``nn.Parameter``. So what is replaced is
the pointer, not the data: ``get_params`` walks every (owner, name, parameter), and :func:`pointed` lets all places that
share a parameter hold another tensor for a while.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynlm.types import InputError


class Place(NamedTuple):
    """An attribute that holds a parameter: ``getattr(owner, name)``."""

    owner: nn.Module
    name: str


class Adapted(NamedTuple):
    """One adapted tensor. ``matrix_RC`` shares its storage: writing to it changes the model."""

    name: str
    parameter: nn.Parameter
    places: tuple[Place, ...]
    """every place that holds it: one, or several where it is shared"""

    @property
    def matrix_RC(self) -> Tensor:
        return as_matrix(self.parameter.detach())


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a view with two axes: the first one, and all others together; a vector or scalar is one row."""
    return tensor.view(1, -1) if tensor.dim() < 2 else tensor.view(tensor.shape[0], -1)


def get_params(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(owner, name, parameter) of a module and all it contains, a shared parameter once, in the module's order."""
    for _, adapted in _every(module):
        owner, name = adapted.places[0]
        yield owner, name, adapted.parameter


def _every(module: nn.Module) -> list[tuple[list[str], Adapted]]:
    """All parameters with all their qualified names and places; a module used twice is one owner with two names."""
    found: dict[int, tuple[list[str], Adapted]] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            qualified = f"{prefix}.{name}" if prefix else name
            aliases, adapted = found.get(id(parameter), ([], Adapted(qualified, parameter, ())))
            place = Place(owner, name)
            places = adapted.places if place in adapted.places else (*adapted.places, place)
            found[id(parameter)] = ([*aliases, qualified], adapted._replace(places=places))
    return list(found.values())


@contextmanager
def pointed(adapted: Sequence[Adapted], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, every place of ``adapted[i]`` holds ``tensors[i]`` in the parameter's shape; then the parameter again.

    The tensors may be leaves or nodes of a graph: a module computes with them as it would with its parameters, and what
    shares a parameter shares its stand-in. ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` keep a second list of their weights,
    which is refreshed.
    """
    try:
        for a, tensor in zip(adapted, tensors, strict=True):
            _point(a.places, tensor.view(a.parameter.shape))
        _refresh(adapted)
        yield
    finally:
        for a in adapted:
            _point(a.places, a.parameter)
        _refresh(adapted)


def _point(places: Sequence[Place], tensor: Tensor) -> None:
    for owner, name in places:
        owner._parameters[name] = tensor  # type: ignore[assignment]  # as torch.func.functional_call does


def _refresh(adapted: Sequence[Adapted]) -> None:
    owners = {id(place.owner): place.owner for a in adapted for place in a.places}
    for owner in owners.values():
        if isinstance(owner, nn.RNNBase):
            names = owner._flat_weights_names
            owner._flat_weights = [getattr(owner, name, None) for name in names]


def adapted_parameters(model: nn.Module, globs: Sequence[str] = ("*",)) -> list[Adapted]:
    """Return the trainable parameters whose names match any glob, in the module's order, each shared tensor once.

    Raises:
        InputError: a glob that matches no parameter, globs that match frozen ones alone (``requires_grad`` is False, as
            of quantised weights), or a parameter that is not contiguous.
    """
    matched = matched_parameters(model, globs)
    chosen = [adapted for adapted in matched if adapted.parameter.requires_grad]
    if not chosen:
        name, dtype = matched[0].name, matched[0].parameter.dtype
        raise InputError(
            f"all parameters of {type(model).__name__} that match {' '.join(globs)} are frozen ({name!r}, {dtype}): "
            "unfreeze some; quantised weights cannot be adapted: use LoRA or adapt other tensors"
        )
    scattered = next((adapted.name for adapted in chosen if not adapted.parameter.is_contiguous()), None)
    if scattered:
        raise InputError(f"parameter {scattered!r} is not contiguous: leave it out, or make it so")
    return chosen


def matched_parameters(model: nn.Module, globs: Sequence[str]) -> list[Adapted]:
    """Return the parameters whose names match any glob, frozen ones too.

    Raises:
        InputError: a glob that matches no parameter.
    """
    every = _every(model)
    names = [name for aliases, _ in every for name in aliases]
    if not names:
        raise InputError(f"{type(model).__name__} has no parameter: nothing to adapt")
    wanted = set(matching(names, globs, "glob", f"parameter of {type(model).__name__}"))
    found = []
    for aliases, adapted in every:
        name = next((alias for alias in aliases if alias in wanted), None)
        if name is not None:
            found.append(adapted._replace(name=name))
    return found


def matching(names: Sequence[str], globs: Sequence[str], setting: str, kind: str) -> list[str]:
    """Return the names that match any glob, in their order.

    Raises:
        InputError: a glob that matches none: "``setting`` GLOB matches no ``kind``", and the nearest name.
    """
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            (close,) = difflib.get_close_matches(glob, names, n=1, cutoff=0.0)
            raise InputError(f"{setting} {glob!r} matches no {kind}: did you mean {close!r}?")
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def split_like(flat_N: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return a vector as views in the shapes of ``like``, one after the other."""
    parts = flat_N.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def flat_view(adapted: Sequence[Adapted]) -> Tensor:
    """Return all adapted weights as one vector (N,) that shares their storage: writing to it changes the model.

    The first call moves the parameters into one buffer, values unchanged; a later one finds them there. Moving a model
    (``.to``, ``.double``) gives each parameter its own storage again, and old views then see nothing of it.
    """
    parameters = [a.parameter for a in adapted]
    if not parameters:
        raise InputError("no adapted parameter: nothing to view")
    first, n = parameters[0], sum(p.numel() for p in parameters)
    if any(p.dtype != first.dtype or p.device != first.device for p in parameters):
        kinds = sorted({f"{p.dtype} on {p.device}" for p in parameters})
        raise InputError(f"a flat view needs one dtype and device, found {', '.join(kinds)}: choose with globs")
    if not _in_one_buffer(parameters):
        buffer = torch.cat([p.detach().reshape(-1) for p in parameters])
        offset = 0
        for p in parameters:
            p.data = buffer[offset : offset + p.numel()].view(p.shape)
            offset += p.numel()
    return first.detach().as_strided((n,), (1,))


def _in_one_buffer(parameters: Sequence[nn.Parameter]) -> bool:
    first, n = parameters[0], 0
    for p in parameters:
        place = p.untyped_storage().data_ptr(), p.storage_offset()  # a parameter without elements has no data pointer
        if place != (first.untyped_storage().data_ptr(), first.storage_offset() + n):
            return False
        n += p.numel()
    return True
