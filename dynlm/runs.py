"""The run directory: what lies where, and checkpoints of unfinished work (dynlm.files is the door to disk).

RUN/recipe.json            the settings in force        RUN/rules/           tuned and learned rules
RUN/tokenizer/  RUN/model/ the base language model      RUN/evaluate/        results.json, losses.safetensors
RUN/prior.safetensors      static RMS of the gradient   RUN/report.html, RUN/figures/  the report
RUN/checkpoints/           unfinished work, for --resume
RUN/.lock                  held by the command that works here (dynlm.claim)
RUN/demo.txt               the demo made this run, and may replace it
RUN/few-shot.json          few-shot comparison        RUN/few-shot/          its learned starts θ0
RUN/trackers/              what trackers of training write (``--log-with``)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import torch

from dynlm.files import Json as Json
from dynlm.files import is_tensors
from dynlm.files import read_json as read_json
from dynlm.files import read_tensors as read_tensors
from dynlm.files import replacing as replacing
from dynlm.files import require_layout as require_layout
from dynlm.files import write_json as write_json
from dynlm.files import write_tensors as write_tensors
from dynlm.files import write_text as write_text
from dynlm.methods import SUFFIX, Method
from dynlm.settings import Whole, build, check
from dynlm.types import InputError


class Record(TypedDict):
    """A line of a log; it holds more."""

    step: int


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
        self.trackers = self.path / "trackers"

    def rule(self, name: str) -> Path:
        """Return the file of a rule or cache, by the name of its method."""
        method = Method.parse(name)
        return _kept(self.path / "rules" / f"{method.stem}{SUFFIX}", str(method))

    def rules(self) -> list[str]:
        """Return names of the rules and caches that the run holds."""
        files = [p for p in self.path.glob("rules/*") if p.is_file() and (p.suffix == SUFFIX or is_tensors(p))]
        return sorted({str(method) for path in files if (method := Method.find(path.name))})

    def few_shot_start(self, method: str) -> Path:
        return self.path / "few-shot" / f"{method}.safetensors"

    def start(self, method: str) -> Path:
        return self.path / "starts" / f"{method}.safetensors"

    def checkpoint(self, stage: str) -> Path:
        return _kept(self.path / "checkpoints" / f"{stage}{SUFFIX}", f"{stage.replace('-seed', '#')}{SUFFIX}")

    def parts(self, stage: str) -> Path:
        """Return the folder of what an unfinished stage has finished."""
        return self.path / "checkpoints" / stage

    @property
    def retraining(self) -> Run:
        """Where a finished base model is trained again: it stays until the new one is finished."""
        return Run(self.parts("train"))

    def log(self, stage: str) -> Path:
        return _kept(self.path / f"{stage}.jsonl", f"{stage.replace('-seed', '#')}.jsonl")

    def derived(self) -> list[Path]:
        """What dynlm made from base model and tokenizer. Files that others have put beside it are not among them."""
        found = [self.prior, self.results, self.losses, self.demo, self.parts("evaluate"), *self.reported()]
        found += [path for path in self.path.glob("rules/*") if path.stem != "general" and is_tensors(path)]
        found += [path for path in self.path.glob("starts/*.safetensors") if is_tensors(path)]
        for pattern in ("meta-train*.jsonl", "checkpoints/meta-train*.safetensors", "checkpoints/learn-start*"):
            found += self.path.glob(pattern)
        return [path for path in found if path.exists()]

    def reported(self) -> list[Path]:
        """Return the report and its figures."""
        figures = [path for path in self.figures.glob("*") if FIGURE.fullmatch(path.name)]
        return [path for path in (self.report, *figures) if path.exists()]

    def require(self, path: Path, made_by: str) -> Path:
        """``path``, or an error that names the command that makes it."""
        if not path.exists():
            raise InputError(f"{path} does not exist: run `dynlm {made_by}` with this run directory first")
        return path


def _kept(path: Path, old: str) -> Path:
    """``path``, or the file beside it that an earlier version has named ``old``."""
    earlier = path.with_name(old)
    return earlier if earlier.is_file() and not path.exists() else path


def settings_of(config: Any) -> Json:
    """Return a configuration as JSON gives it back: tuples are lists."""
    settings: Json = json.loads(json.dumps(asdict(config)))
    return settings


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the state of an optimizer for a checkpoint: ``optimizer.PARAMETER.NAME``."""
    slots = optimizer.state_dict()["state"].items()
    return {f"optimizer.{index}.{name}": value for index, of_one in slots for name, value in of_one.items()}


def optimizer_layout(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold of an optimizer of Adam's family: of every parameter the same, or nothing at all."""
    if not any(key.startswith("optimizer.") for key in tensors):
        return {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [f"optimizer.{index}" for index in range(len(parameters))]
    if "optimizer.step" in tensors:  # of the only parameter, as earlier versions wrote it
        names = ["optimizer"]
    layout: dict[str, torch.Tensor] = {}
    for name, p in zip(names, parameters, strict=True):
        layout |= {f"{name}.exp_avg": p, f"{name}.exp_avg_sq": p, f"{name}.step": torch.zeros(())}
    return layout


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
    """Inside, what a checkpoint holds is used for the first time: that it does not fit is one clear line."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"the checkpoint does not fit this {owner} ({reason}): use --overwrite to start again"
        ) from None


Position = TypeVar("Position")


def progress_of(kind: type[Position], meta: Json, steps: int) -> Position:
    """Return where the work of a checkpoint stands.

    Raises:
        InputError: no such record, or one of more than ``steps`` steps.
    """
    progress: Any = build(kind, meta.get("progress"), "progress")
    step_of({"step": progress.step}, steps)
    found: Position = progress
    return found


def step_of(meta: Json, steps: int) -> int:
    """Return the step of a checkpoint, of ``steps``."""
    step: int = check(Whole, meta.get("step"), "step")
    if step > steps:
        raise InputError(f"it is at step {step:,} of {steps:,}")
    return step


def log_of(meta: Json) -> list[Json]:
    """Return the records of a checkpoint's log, each of a step."""
    return cast(list[Json], check(list[Record], meta.get("log"), "log"))


def write_log(path: Path, records: Sequence[Json]) -> None:
    """One JSON line a step: what a stage did.

    A checkpoint keeps the same records, so that no step is lost or logged twice.
    """
    write_text(path, "".join(f"{json.dumps(record)}\n" for record in records))
