"""What an unfinished evaluation has read: a file for each method, which ``--resume`` takes instead of reading again."""

from __future__ import annotations

from pathlib import Path

import torch

from dynlm.evaluation.gates import Gates
from dynlm.evaluation.stream import Scores
from dynlm.files import Json, read_tensors, write_tensors
from dynlm.types import InputError


def save_part(path: Path, scores: Scores, made: Json) -> None:
    """Write the scores of one method; ``made`` is all that they depend on."""
    tensors = {"losses": torch.cat(scores.losses), "lengths": torch.tensor([len(x) for x in scores.losses])}
    if scores.again is not None:
        tensors["again"] = scores.again
    gates: Json | None = None
    if scores.gates is not None:
        tensors["gates"] = scores.gates.values_3Un
        gates = {name: getattr(scores.gates, name) for name in ("tensors", "weights", "segments")}
    meta = {"made": made, "seconds": scores.seconds, "calibration": scores.calibration, "gates": gates}
    write_tensors(path, tensors, meta)


def load_part(path: Path, made: Json) -> Scores | None:
    """The counterpart of :func:`save_part`; None where there is none, or one that was made with other settings."""
    if not path.exists():
        return None
    tensors, meta = read_tensors(path)
    if meta.get("made") != made:
        return None
    try:
        gates = Gates(tensors["gates"], **meta["gates"]) if meta["gates"] else None
        losses = list(tensors["losses"].split(tensors["lengths"].tolist()))
        return Scores(losses, meta["seconds"], meta["calibration"], tensors.get("again"), gates)
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is not whole ({error}): start again", setting="overwrite") from None
