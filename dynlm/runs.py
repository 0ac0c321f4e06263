"""The run directory: the one door to disk.

Every write goes to a temporary name beside its target and is renamed, so that an interrupted command leaves the
earlier file whole. Tensors are safetensors, everything else JSON; nothing is pickled.

    RUN/recipe.json            the settings in force        RUN/rules/NAME/      tuned and learned rules
    RUN/tokenizer/  RUN/model/ the base language model      RUN/evaluate/        results.json, losses.safetensors
    RUN/prior.safetensors      static RMS of the gradient   RUN/report.html, RUN/figures/  the report
    RUN/checkpoints/           unfinished work, for --resume
    RUN/.lock                  held by the command that works here (dynlm.claim)
    RUN/demo.txt               the demo made this run, and may replace it
    RUN/few-shot.json          few-shot comparison        RUN/few-shot/          its learned starts θ0
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dynlm.types import InputError

Json = dict[str, Any]
FIGURE = re.compile(r"(gain|by-position|per-article|stream|words|boundaries|calibration|gates-\d+)\.(svg|png|pdf)")
"""names of the report's figures"""


class Run:
    """Paths of one run directory. Constructing it touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        if not str(path) or "\0" in str(path):
            raise InputError(f"--run is {str(path)!r}: give the name of a directory")
        self.path = Path(path)
        self.recipe = self.path / "recipe.json"
        self.tokenizer = self.path / "tokenizer"
        self.model = self.path / "model"
        self.prior = self.path / "prior.safetensors"
        self.evaluation = self.path / "evaluate"
        self.results = self.evaluation / "results.json"
        self.losses = self.evaluation / "losses.safetensors"
        self.report = self.path / "report.html"
        self.figures = self.path / "figures"
        self.few_shot = self.path / "few-shot.json"
        self.demo = self.path / "demo.txt"

    def rule(self, name: str) -> Path:
        return self.path / "rules" / name

    def rules(self) -> list[str]:
        """Names of the rules and caches that the run holds."""
        return sorted(path.name for path in self.path.glob("rules/*") if path.is_file() and path.name[0] != ".")

    def few_shot_start(self, method: str) -> Path:
        return self.path / "few-shot" / f"{method}.safetensors"

    def start(self, method: str) -> Path:
        return self.path / "starts" / f"{method}.safetensors"

    def checkpoint(self, stage: str) -> Path:
        return self.path / "checkpoints" / f"{stage}.safetensors"

    def parts(self, stage: str) -> Path:
        """The folder of what an unfinished stage has finished."""
        return self.path / "checkpoints" / stage

    @property
    def retraining(self) -> Run:
        """Where a finished base model is trained again: it stays until the new one is finished."""
        return Run(self.parts("train"))

    def log(self, stage: str) -> Path:
        return self.path / f"{stage}.jsonl"

    def derived(self) -> list[Path]:
        """What dynlm made from base model and tokenizer. Files that others have put beside it are not among them."""
        found = [self.prior, self.results, self.losses, self.demo, self.parts("evaluate"), *self.reported()]
        found += [path for path in self.path.glob("rules/*") if path.name != "general" and is_tensors(path)]
        found += [path for path in self.path.glob("starts/*.safetensors") if is_tensors(path)]
        for pattern in ("meta-train*.jsonl", "checkpoints/meta-train*.safetensors", "checkpoints/learn-start*"):
            found += self.path.glob(pattern)
        return [path for path in found if path.exists()]

    def reported(self) -> list[Path]:
        """The report and its figures."""
        figures = [path for path in self.figures.glob("*") if FIGURE.fullmatch(path.name)]
        return [path for path in (self.report, *figures) if path.exists()]

    def require(self, path: Path, made_by: str) -> Path:
        """``path``, or an error that names the command that makes it."""
        if not path.exists():
            raise InputError(f"{path} does not exist: run `dynlm {made_by}` with this run directory first")
        return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` that takes its place when the block ends without an error.

    Works for files and for directories; a directory is swapped in after the old one has moved aside.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another run directory") from error
    try:
        target = scratch / path.name
        yield target
        if path.is_dir():
            os.rename(path, scratch / "old")
        os.replace(target, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Strict JSON: a NaN or infinity is an error here, not in the reader's parser."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not readable JSON ({error}): make it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a JSON object: make it again")
    return value


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], meta: Json | None = None) -> None:
    """Tensors and a JSON-valued ``meta`` in one safetensors file."""
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata={"meta": json.dumps(meta or {})})


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], Json]:
    """The counterpart of :func:`write_tensors`; a missing or truncated file is one clear line."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, json.loads((file.metadata() or {}).get("meta", "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path} is truncated or not safetensors ({error}): delete it and make it again") from error


def is_tensors(path: Path) -> bool:
    """Whether a file is one that :func:`write_tensors` wrote: safetensors, whose header follows its length."""
    if not path.is_file() or path.is_symlink():
        return False
    with path.open("rb") as file:
        head = file.read(1 << 16)
    return head.startswith(b'{"__metadata__":{', 8) and b'"meta":' in head


def settings_of(config: Any) -> Json:
    """A configuration as JSON gives it back: tuples are lists."""
    settings: Json = json.loads(json.dumps(asdict(config)))
    return settings


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of an optimizer for a checkpoint: ``optimizer.PARAMETER.NAME``."""
    slots = optimizer.state_dict()["state"].items()
    return {f"optimizer.{index}.{name}": value for index, of_one in slots for name, value in of_one.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """The counterpart of :func:`optimizer_tensors`; ``optimizer.NAME`` is of the only parameter."""
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key in (k for k in tensors if k.startswith("optimizer.")):
        _, *index, name = key.split(".")
        slots.setdefault(int(index[0]) if index else 0, {})[name] = tensors[key]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


@contextmanager
def resuming(meta: Json, config: Any, table: str, owner: str = "run", model: str = "") -> Iterator[None]:
    """Inside, a checkpoint is taken over: that it has other settings, or does not fit, is one clear line.

    ``model``: fingerprint of the base model that the work belongs to, where there is one.
    """
    if meta.get("config") != settings_of(config):
        raise InputError(
            f"the checkpoint was made with other [{table}] settings: resume with those, or use --overwrite"
        )
    if meta.get("model", "") != model:
        raise InputError(
            f"the checkpoint belongs to the base model {meta.get('model')}, this run holds {model}: use --overwrite"
        )
    with fitting(owner):
        yield


@contextmanager
def fitting(owner: str = "run") -> Iterator[None]:
    """Inside, a checkpoint is taken over: that it does not fit is one clear line."""
    try:
        yield
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"the checkpoint does not fit this {owner} ({error}): use --overwrite to start anew") from None


def write_log(path: Path, records: Sequence[Json]) -> None:
    """One JSON line a step: what a stage did.

    A checkpoint keeps the same records, so that no step is lost or logged twice.
    """
    write_text(path, "".join(f"{json.dumps(record)}\n" for record in records))
