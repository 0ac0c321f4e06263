"""What recipe.json says of a run apart from settings: that dynlm made it, whether it is finished, what it was made of.

A fingerprint is 16 hexadecimal digits of SHA-256. recipe.json keeps those of the corpus, the tokenizer and the base
model; whatever is made from the model keeps the model's. Each stage compares them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dynlm.files import Json, read_json
from dynlm.types import InputError

KEY = "dynlm"
"""of the stamp in recipe.json"""
SCHEMA = 1


@dataclass(frozen=True)
class Stamp:
    """The stamp of a run."""

    finished: bool = True
    """whether training of the base model came to its end"""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """of ``data``, ``tokenizer`` and ``model``; empty in a run without a base model"""

    def put_on(self, settings: Json) -> Json:
        """Return the content of recipe.json."""
        return {KEY: {"schema": SCHEMA, "finished": self.finished, "fingerprints": {**self.fingerprints}}, **settings}

    def require(self, what: str, found: str, where: str, advice: str) -> None:
        """Refuse a corpus, tokenizer or model that is not the one that this run was made with."""
        made_with = self.fingerprints.get(what)
        if found != made_with:
            raise InputError(
                f"the {what} differs: {where} has the fingerprint {found}, this run was made with {made_with}: {advice}"
            )

    def require_own(self, path: Path, made: Mapping[str, object]) -> None:
        """Refuse a rule, cache or start that says of itself that it was made with another base model."""
        model = self.fingerprints["model"]
        if made.get("model", model) != model:
            raise InputError(
                f"{path} was made with the base model {made['model']}, this run holds {model}: make it again"
            )


def unfinished(path: Path, command: str) -> str:
    """Return a note on a result that may still change."""
    return f"{path} is unfinished, its best validation so far is used; `dynlm {command} --resume` goes on"


def read_stamped(path: Path) -> tuple[Json, Stamp]:
    """Return (settings, stamp) of a recipe.json.

    Raises:
        InputError: a file that dynlm did not write, or that another version of it wrote.
    """
    values = read_json(path)
    stamp = values.pop(KEY, None)
    if not isinstance(stamp, dict):
        raise InputError(
            f"{path} has no schema number: it is no run of dynlm, or one of an earlier version, which `dynlm train` "
            f"makes again in another run directory"
        )
    if stamp.get("schema") != SCHEMA:
        raise InputError(
            f"{path} has schema {stamp.get('schema')!r}, this version of dynlm reads {SCHEMA}: "
            f"use the version that made the run, or train again in another run directory"
        )
    finished, fingerprints = stamp.get("finished"), stamp.get("fingerprints")
    if not isinstance(finished, bool) or not isinstance(fingerprints, dict):
        raise InputError(f"{path} was changed: finished or fingerprints are missing: train again in another folder")
    return values, Stamp(finished, fingerprints)


def fingerprint_files(path: Path) -> str:
    """The fingerprint of a file, or of the names and contents of all files in a folder.

    Hidden files do not count, nor what Python compiles: installing a package adds that to the folder of a model.
    """
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            with file.open("rb") as content:
                digest.update(name.as_posix().encode() + b"\0" + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]
