"""A reader's memory on disk: what reading changed, as small differences from θ0.

A memory goes on exactly where the reader stopped: weights, the rule's state, hidden states of both readers. Stored are
θ − θ0 as float16 over each tensor's largest difference (an error of at most 2⁻¹² of that), the rule's state a weight as
bfloat16 (relative error at most 2⁻⁸; a plain float16 would lose small squares) and everything else as it is. Losses
of what is read next differ by rounding alone: about 10⁻⁶ nats a token on WikiText-2 with rms and gated, and
tests/cli/test_read.py holds them to 10⁻⁴.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlm.files import Json, read_tensors, require_layout, write_tensors
from dynlm.inner import InnerLoop, Snapshot
from dynlm.meta.positions import pack, unpack
from dynlm.optim.base import RuleState
from dynlm.settings import Finite, check
from dynlm.types import InputError

KIND = "dynlm memory 1"


def save_memory(path: Path, static: InnerLoop, adapted: InnerLoop, belongs: Json) -> None:
    """Write the readers' position; ``belongs`` are the fingerprints that :func:`load_memory` asks for.

    Raises:
        InputError: weights that are not finite, which nothing could read on from.
    """
    position = adapted.snapshot()
    if not all(bool(theta.isfinite().all()) for theta in position.thetas):
        raise InputError(
            f"{path.name} was not written: the last update by {adapted.rule.name} left weights that are not finite"
        )
    tensors: dict[str, Tensor] = {}
    scales = {}
    for prior, theta in zip(adapted.priors, position.thetas, strict=True):
        delta = theta - prior.theta0
        scale = float(delta.abs().max()) or 1.0
        tensors[f"delta.{prior.name}"], scales[prior.name] = (delta / scale).half(), scale
    state = position.state
    slots = [tuple(slot.bfloat16() for slot in of_tensor) for of_tensor in state.slots]
    rest = dataclasses.replace(state, slots=slots), position.hidden, static.hidden
    layout = pack(rest, "state", tensors)
    told = {"kind": KIND, **belongs, "segment": adapted.config.segment, "scales": scales, "state": layout}
    write_tensors(path, tensors, told)


class Memory(NamedTuple):
    """A position to read on from."""

    position: Snapshot
    """of the adapted reader"""
    static_hidden: Any
    segment: int | None
    """tokens between two updates when it was made; None where an older version made it"""


def load_memory(path: Path, adapted: InnerLoop, belongs: Json) -> Memory:
    """Return what :func:`save_memory` wrote.

    Raises:
        InputError: not a memory, or one of another model or rule.
    """
    tensors, meta = read_tensors(path)
    if meta.get("kind") != KIND:
        raise InputError(f"{path} is no memory: Reader.save_memory writes one", setting="save_memory")
    for name, own in belongs.items():
        found = meta.get(name, own if name == "carry" else None)  # older memories do not say what they carry
        if found != own:
            raise InputError(f"{path} belongs to another {name} ({found}, this one is {own}): read with that")
    try:
        position, static_hidden = _unpacked(tensors, meta, adapted)
        _try(position, static_hidden, adapted)
    except Exception as error:  # whatever a damaged file holds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{path} is not a whole memory ({reason}): save it again") from None
    segment = meta.get("segment")
    return Memory(position, static_hidden, segment if isinstance(segment, int) else None)


def _unpacked(tensors: dict[str, Tensor], meta: Json, adapted: InnerLoop) -> tuple[Snapshot, Any]:
    """Return (position, hidden state of the static reader), of the reader's own shapes and finite."""
    deltas = {f"delta.{prior.name}": prior.theta0 for prior in adapted.priors}
    require_layout("it", {name: tensors[name] for name in deltas}, deltas, advice="")
    rest = {name: tensor for name, tensor in tensors.items() if name not in deltas}
    require_layout("it", rest, rest, advice="")
    thetas = []
    for prior in adapted.priors:
        scale = check(Finite, meta["scales"][prior.name], "scale")
        thetas.append(prior.theta0 + tensors[f"delta.{prior.name}"].to(prior.theta0) * scale)
    state, hidden, static_hidden = unpack(meta["state"], tensors, thetas[0].device)
    fresh = _slots(adapted.state)
    require_layout("it", _slots(state), fresh, advice="")
    slots = [tuple(s.to(t.dtype) for s in part) for part, t in zip(state.slots, thetas, strict=True)]
    return Snapshot(thetas, dataclasses.replace(state, slots=slots), hidden), static_hidden


def _slots(state: RuleState) -> dict[str, Tensor]:
    """Return the tensors of a rule's state whose shapes the model gives."""
    slots = {f"slot {i} {k}": s for i, part in enumerate(state.slots) for k, s in enumerate(part)}
    return slots | {"tensors": state.tensors}


def _try(position: Snapshot, static_hidden: Any, adapted: InnerLoop) -> None:
    """Read one token on from a copy of the position, then go back to the start."""
    one_S, clipped = torch.zeros(1, dtype=torch.long, device=position.thetas[0].device), adapted.clipped
    try:
        with torch.no_grad():
            adapted.score(one_S, one_S, static_hidden)
        adapted.resume(copied(position))
        adapted.segment(one_S, one_S)
    finally:
        adapted.begin()
        adapted.clipped = clipped


def copied(snapshot: Snapshot) -> Snapshot:
    """Return a position that may be resumed while the given one is kept."""
    thetas = [theta.clone() for theta in snapshot.thetas]
    return Snapshot(thetas, copy.deepcopy(snapshot.state), snapshot.hidden)
