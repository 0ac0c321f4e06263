"""The stage ``few-shot``: learned starts of several methods, tested on the same tasks and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict, cast

import torch

import dynlm
from dynlm.changes import changing
from dynlm.files import Json, read_tensors, write_json, write_tensors
from dynlm.kept import Call, free_parts, mark
from dynlm.labs.fewshot.tasks import TaskSplits, load_tasks
from dynlm.labs.fewshot.trial import METHODS, FewShotConfig, Trial
from dynlm.processes import count, require_work
from dynlm.provenance import record
from dynlm.runs import Run
from dynlm.settings import NotNegative, Positive, check
from dynlm.types import InputError


def few_shot(call: Call, config: FewShotConfig) -> Json:
    """Return every method over the same tasks: few-shot.json, and the learned starts beside it.

    With ``resume``, methods that an earlier command finished under the same settings are taken over. An earlier
    comparison stays until all methods are finished.
    """
    run = Run(call.run)
    parts = run.parts("few-shot")
    for name in config.methods:
        if name not in METHODS:
            raise InputError(f"fewshot.methods: unknown {name!r}: choose from {', '.join(METHODS)}")
        free_parts(run.few_shot_start(name), parts, call)
    free_parts(run.few_shot, parts, call)
    finished = {name: _finished(run, name, call, config) for name in config.methods} if call.resume else {}
    require_work(config.outer.tasks, "fewshot.outer.tasks")
    if config.outer.stacked and count() > 1:
        raise InputError(
            "fewshot.outer.stacked reads all tasks of a step in one process: set it to false to share them"
        )
    splits = load_tasks(config.tasks)
    if parts.exists() and not call.resume:
        with changing(run.path) as new:
            new.remove(parts)
    torch.set_num_threads(1)  # such small networks lose by threads
    results: Json = {}
    for name in config.methods:
        results[name] = finished.get(name) or _run_method(call, config, name, splits)
    print(table(results, config.tasks.kind))
    versions = {"dynlm": dynlm.__version__, "torch": torch.__version__}
    with changing(run.path) as new:
        mark(new, run, call)
        for name in config.methods:
            if (part := _part(run, name)).exists():
                shutil.copy(part, new.at(run.few_shot_start(name)))
        comparison = {"schema": 1, "fewshot": asdict(config), "versions": versions, "methods": results}
        write_json(new.at(run.few_shot), comparison)
        record(new, run, run.few_shot)
        new.remove(parts)
    print(f"results: {run.few_shot}")
    return {"methods": results}


def own_settings(settings: Mapping[str, object], name: str) -> Json:
    """Return what the result of one method depends on, as JSON has it: without the settings of the others."""
    others = {"methods"}
    for prefix, method in (("reptile", "reptile"), ("proximal", "imaml")):
        if METHODS[name] != method:
            others |= {key for key in settings if key.startswith(prefix)}
    kept: Json = json.loads(json.dumps({key: value for key, value in settings.items() if key not in others}))
    if METHODS[name] != "imaml" and isinstance(kept.get("outer"), dict):
        kept["outer"].pop("cg_steps", None)
    return kept


class Seconds(TypedDict):
    """CPU time of a method."""

    total: NotNegative


class Result(TypedDict):
    """What the table shows of a method; it holds more."""

    error: float
    error_ci95: tuple[float, float]
    lr: Positive
    cpu_seconds: Seconds


class Made(TypedDict):
    """What the file of a learned start says of itself."""

    result: Result
    settings: Json


def _part(run: Run, name: str) -> Path:
    """Return where a method of an unfinished comparison is kept."""
    return run.parts("few-shot") / f"{name}.safetensors"


def _finished(run: Run, name: str, call: Call, config: FewShotConfig) -> Json | None:
    """Return the result of a method that was finished under these settings, in this comparison or in an earlier one.

    Raises:
        InputError: an earlier comparison has it under other settings, and ``overwrite`` does not allow to replace it.
    """
    for path in (_part(run, name), run.few_shot_start(name)):
        if not path.exists():
            continue
        made: Made = check(Made, read_tensors(path)[1], str(path))
        if own_settings(made["settings"], name) == own_settings(asdict(config), name):
            return cast(Json, made["result"])
        if path != _part(run, name) and not call.overwrite:
            raise InputError(f"{path} was made with other settings: add --overwrite too, to replace it")
    return None


def _run_method(call: Call, config: FewShotConfig, name: str, splits: TaskSplits) -> Json:
    """Learn, tune and test; the learned start is kept with its result until the comparison is finished."""
    run, trial = Run(call.run), Trial(config, name, splits)
    result = trial.run()
    tensors = {prior.name: prior.theta0 for prior in trial.reader.priors}
    with changing(run.path) as new:
        mark(new, run, call)
        write_tensors(new.at(_part(run, name)), tensors, {"result": result, "settings": asdict(config)})
    return result


def table(results: Json, kind: str) -> str:
    """Return the results as text: squared errors, or accuracies in %."""
    show: Callable[[float], str] = (
        (lambda error: f"{error:8.4f}") if kind == "sinusoid" else (lambda error: f"{100 * (1 - error):6.2f} %")
    )
    head = "squared error" if kind == "sinusoid" else "accuracy"
    lines = [f"{'method':<15}{head} [95 % interval], × joint error, inner rate, CPU minutes"]
    joint = results.get("joint", {}).get("error")
    for name, result in results.items():
        low, high = sorted(map(show, result["error_ci95"]))
        ratio = f"{result['error'] / joint:6.3f}" if joint else "     –"
        minutes = result["cpu_seconds"]["total"] / 60
        lines.append(f"{name:<15}{show(result['error'])} [{low}, {high}]  {ratio}  {result['lr']:8.4g}  {minutes:5.1f}")
    return "\n".join(lines)
