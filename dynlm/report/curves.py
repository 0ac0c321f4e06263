"""Learning curves: what training and meta-training logged, a line a validation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from matplotlib.figure import Figure

from dynlm.report.looks import METHODS
from dynlm.report.page import plain
from dynlm.report.plots import grid
from dynlm.report.svg import Drawing, Table, tell
from dynlm.runs import Run
from dynlm.settings import Whole, check
from dynlm.types import InputError

STAGES = {"train": "training", "meta-train": "meta-training", "learn-optimizer": "learning the optimizer"}
ROWS = 60  # of a table; a curve of more validations is told at every second, third, … of them


class Validation(TypedDict):
    """A line of a log; nats per token, or mean log(last / first loss) of ``learn-optimizer``; None is no number."""

    step: Whole
    train: float | None
    valid: float | None
    seconds: float


def load_curves(run: Run) -> dict[str, list[Validation]]:
    """Return the logs of the stages that trained, by what they did (``meta-training, seed 1``).

    Raises:
        InputError: a log that dynlm did not write.
    """
    curves = {}
    for stage, title in STAGES.items():
        for path in sorted(run.path.glob(f"{stage}*.jsonl")):
            seed = path.stem.removeprefix(stage).removeprefix("-seed").removeprefix("#")
            if path.stem == stage or seed.isdigit():
                curves[title + (f", seed {seed}" if seed else "")] = _validations(path)
    return {title: records for title, records in curves.items() if records}


def _validations(path: Path) -> list[Validation]:
    records: list[Validation] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            values = json.loads(line, parse_constant=lambda _: None)
        except ValueError:
            raise InputError(f"{where} is no JSON: remove the file, its curve is then left out") from None
        known = {name: value for name, value in values.items() if name in Validation.__annotations__}
        records.append(check(Validation, known, where))
    return records


def learning(curves: Mapping[str, Sequence[Validation]]) -> Drawing:
    """Draw the losses by step, a panel a stage: of the batches, and of validation."""
    looks = {kind: (METHODS[i][0], METHODS[i][2]) for i, kind in enumerate(("valid", "train"))}

    def paint(figure: Figure, narrow: bool) -> None:
        panels = grid(figure, len(curves), narrow)
        for axes, (title, records) in zip(panels, curves.items(), strict=True):
            for kind, values in (("valid", [r["valid"] for r in records]), ("train", [r["train"] for r in records])):
                colour, marker = looks[kind]
                known = [(r["step"], value) for r, value in zip(records, values, strict=True) if value is not None]
                (line,) = axes.plot(*zip(*known, strict=True), color=colour, marker=marker, markersize=4, label=kind)
                tell(line, [f"step {step}: {kind} {value:.4f}" for step, value in known])
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_ylabel("log(last / first loss)" if title == STAGES["learn-optimizer"] else "nats per token")
            axes.legend(frameon=False)

    rows = [
        (title, plain(r["step"]), _loss(r["train"]), _loss(r["valid"]), plain(round(r["seconds"])))
        for title, records in curves.items()
        for r in _few(records)
    ]
    numbers = Table(("stage", "step", "train", "valid", "seconds"), rows)
    return Drawing("learning", f"Losses by step of {', '.join(curves)}", 3.3, paint, 0.6 + 2.7 * len(curves), numbers)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _few(records: Sequence[Validation]) -> list[Validation]:
    """Return at most ``ROWS`` of the validations, the last one among them."""
    every = -(-len(records) // ROWS)
    return [*records[::-1]][::every][::-1]
