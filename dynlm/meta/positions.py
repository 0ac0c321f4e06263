"""Positions of estimators as flat tensors and JSON, for checkpoints: whatever they nest, nothing is pickled."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from dynlm.inner import Snapshot
from dynlm.meta.estimators import ForwardPosition, Pair, PESPosition
from dynlm.meta.forward import Tangents
from dynlm.meta.sampling import Stratum
from dynlm.optim.base import Clock, RuleState
from dynlm.optim.features import Statistics
from dynlm.types import InputError

RECORDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (Snapshot, RuleState, Clock, Statistics, Stratum, Tangents, ForwardPosition, Pair, PESPosition)
}


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for ``value``; its tensors go into ``tensors`` under names that begin with ``name``."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if value is None or isinstance(value, int | str):
        return {"plain": value}
    if isinstance(value, float):
        return {"float": value if math.isfinite(value) else repr(value)}
    if RECORDS.get(kind) is type(value):
        fields = _fields(type(value))
        return {"record": kind, "fields": [pack(getattr(value, f), f"{name}.{f}", tensors) for f in fields]}
    if isinstance(value, list | tuple):
        return {kind: [pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    raise InputError(f"a checkpoint cannot hold a {kind}: hidden states may nest tuples, lists, numbers and tensors")


def unpack(packed: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """The counterpart of :func:`pack`, on ``device``; positions of coordinates stay with their tensor's device."""
    ((kind, value), *rest) = packed.items()
    if kind == "tensor":
        return tensors[value].to(device)
    if kind == "plain":
        return value
    if kind == "float":
        return float(value)
    if kind == "record":
        record = RECORDS[value]
        return record(*(unpack(item, tensors, device) for item in rest[0][1]))
    items = [unpack(item, tensors, device) for item in value]
    return items if kind == "list" else tuple(items)


def _fields(record: type[Any]) -> tuple[str, ...]:
    if dataclasses.is_dataclass(record):
        return tuple(f.name for f in dataclasses.fields(record))
    names: tuple[str, ...] = record._fields
    return names
