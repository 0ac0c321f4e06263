"""The run directory: what lies where.

RUN/recipe.json            the settings in force        RUN/rules/           tuned and learned rules
RUN/tokenizer/  RUN/model/ the base language model      RUN/evaluate/        results.json, losses.safetensors
RUN/prior.safetensors      static RMS of the gradient   RUN/report.html, RUN/figures/  the report
RUN/checkpoints/           unfinished work, for --resume
RUN/.lock                  held by the command that works here (dynlm.claim)
RUN/demo.txt               the demo made this run, and may replace it
RUN/few-shot.json          few-shot comparison        RUN/few-shot/          its learned starts θ0
RUN/provenance.json        what made each of these files
RUN/trackers/              what trackers of training write (``--log-with``)
"""

from __future__ import annotations

import re
from pathlib import Path

from dynlm.files import is_tensors
from dynlm.methods import SUFFIX, Method
from dynlm.types import InputError

FIGURE = re.compile(
    r"(gain|by-position|per-article|stream|learning|words|boundaries|calibration|gates-\d+)\.(svg|png|pdf)"
)
"""names of the report's figures"""


class Run:
    """Paths of one run directory. Constructing it touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        if not str(path) or "\0" in str(path):
            raise InputError(f"the run is {str(path)!r}: give the name of a directory", setting="run")
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
        self.provenance = self.path / "provenance.json"
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
