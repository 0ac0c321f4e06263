"""Meta-training of a general-purpose rule on a family of small training tasks (dynlm.models.tasks).

Each outer step trains a few networks from their start, a horizon of steps that is drawn log-uniformly; the replay engine
gives the meta-gradient over windows of each training, and Adam moves φ. A task's gradient is that of the logarithm of
its loss, and its norm is bounded, so that no task speaks louder than the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlm import runs
from dynlm.adapt import Reader
from dynlm.meta.recording import Recording
from dynlm.meta.replay import Replay
from dynlm.meta.sampling import sample_coordinates
from dynlm.models.params import adapted_parameters
from dynlm.models.tasks import TaskConfig, TrainingTask, sample_task
from dynlm.optim.base import Prior, Rule
from dynlm.types import InputError

VALIDATION_SEED = 10**9
"""of the first meta-validation task: training tasks have smaller seeds"""


@dataclass(frozen=True)
class GeneralMetaConfig:
    """Meta-training of a general-purpose rule."""

    steps: int = 600
    """updates of φ"""
    tasks: int = 8
    """trainings an update"""
    window: int = 256
    """steps of a training that one meta-gradient sees"""
    coordinates: int = 8000
    """weights sampled for a window"""
    lr: float = 1e-2
    """peak of Adam's learning rate on φ; cosine to zero over the steps"""
    clip: float = 1.0
    """bound on the norm of a task's meta-gradient"""
    validate_every: int = 25
    """steps between trainings of the meta-validation tasks; each writes a checkpoint"""
    validation_tasks: int = 24
    seed: int = 0
    family: TaskConfig = field(default_factory=TaskConfig)


class Rollout(NamedTuple):
    """How a training went: mean loss of each step, and whether it ended early because a loss was not finite."""

    losses_T: list[float]
    diverged: bool


def blank_priors(task: TrainingTask) -> list[Prior]:
    """Priors for a rule that uses none: the network's present weights."""
    adapted = adapted_parameters(task.net)
    return [Prior(a.name, theta := a.matrix_RC.clone(), theta, 1.0, 1.0) for a in adapted]


def train_task(
    rule: Rule, task: TrainingTask, seed: int, replay: Replay | None = None, config: GeneralMetaConfig | None = None
) -> Rollout:
    """Train the task's network over its horizon; with ``replay``, add the meta-gradient to φ's gradients.

    The network keeps its trained weights.
    """
    config = config or GeneralMetaConfig()
    reader = Reader(task.net, task.score, rule, blank_priors(task))
    pieces, generator, losses = task.pieces(task.horizon, seed), torch.Generator().manual_seed(seed), list[float]()
    sizes = [theta.numel() for theta in reader.thetas]
    for start in range(0, task.horizon, config.window):
        window = pieces[start : start + config.window]
        recording = None
        if replay:
            recording = Recording(reader, sample_coordinates(sizes, config.coordinates, generator, 256), len(window))
        diverged = False
        for piece in window:
            try:
                step = reader.segment(*piece)
            except InputError:  # a loss that is not finite
                diverged = True
                break
            losses.append(float(step.losses_S.mean()))
            if recording is not None:
                recording.add(step, reader.state.clock.step, 0.0)
        if recording is not None and replay is not None and len(recording):
            recording.weights = _weights(losses, len(recording), task.horizon)
            replay(recording)
        if diverged:
            return Rollout(losses, True)
    return Rollout(losses, False)


def _weights(losses_T: Sequence[float], n: int, horizon: int) -> list[float]:
    """Of the last n steps: those of the logarithm of the smoothed loss, averaged with weights that grow with time.

    Losses below a hundredth of the first count as that.
    """
    least, smooth, weights = losses_T[0] / 100, losses_T[0], []
    for t, loss in enumerate(losses_T, 1):
        smooth += 0.05 * (loss - smooth)
        weights.append(2 * t / horizon**2 / max(smooth, least))
    return weights[-n:]


class GeneralTrainer:
    """φ, its optimizer, and how far they are."""

    def __init__(self, rule: Rule, config: GeneralMetaConfig) -> None:
        self.rule, self.config = rule, config
        self.phi = [p for p in rule.parameters() if p.requires_grad and p.numel()]
        self.optimizer = torch.optim.Adam(self.phi, lr=config.lr, betas=(0.9, 0.98))
        self.replay = Replay(rule)
        self.done = 0

    def step(self) -> float:
        """Train the step's tasks and update φ; returns their mean log ratio of last to first loss."""
        config, total, ratios = self.config, [torch.zeros_like(p) for p in self.phi], []
        for i in range(config.tasks):
            seed = (config.seed * config.steps + self.done) * config.tasks + i
            rollout = train_task(self.rule, sample_task(seed, config.family), seed, self.replay, config)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.phi]
            norm = float(torch.cat([g.flatten() for g in grads]).norm())
            self.optimizer.zero_grad(set_to_none=True)
            if math.isfinite(norm):
                for sum_, g in zip(total, grads, strict=True):
                    sum_ += g * (min(1.0, config.clip / (norm + 1e-12)) / config.tasks)
            tail = rollout.losses_T[-max(1, len(rollout.losses_T) // 10) :]
            ratios.append(math.log(max(sum(tail) / len(tail), 1e-3 * rollout.losses_T[0]) / rollout.losses_T[0]))
        for p, g in zip(self.phi, total, strict=True):
            p.grad = g
        warmup, fraction = min(1.0, (self.done + 1) / 10), self.done / config.steps
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * warmup * math.cos(math.pi / 2 * fraction) ** 2
        self.optimizer.step()
        self.done += 1
        return sum(ratios) / len(ratios)

    def validate(self) -> float:
        """Mean over fixed tasks of log(last / first held-out loss); a divergence counts as no gain."""
        ratios = []
        for i in range(self.config.validation_tasks):
            task = sample_task(VALIDATION_SEED + i, self.config.family)
            first = task.validate()
            rollout = train_task(self.rule, task, VALIDATION_SEED + i)
            last = math.nan if rollout.diverged else task.validate()
            ratios.append(math.log(max(last, 1e-3 * first) / first) if math.isfinite(last) else 0.0)
        return sum(ratios) / len(ratios)

    def state(self) -> tuple[dict[str, Tensor], runs.Json]:
        tensors: dict[str, Tensor] = {f"phi.{name}": p for name, p in self.rule.named_parameters()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in slots.items()}
        return tensors, {"done": self.done}


def meta_train_general(trainer: GeneralTrainer, log: Any, checkpoint: Any) -> None:
    started = time.perf_counter()
    print("start", trainer.validate(), flush=True)
    while trainer.done < trainer.config.steps:
        ratio = trainer.step()
        record = {"step": trainer.done, "train": ratio, "seconds": time.perf_counter() - started}
        if trainer.done % trainer.config.validate_every == 0:
            record["valid"] = trainer.validate()
            runs.write_tensors(checkpoint(trainer.done), *trainer.state())
        runs.append_log(log, record)
        print(record, flush=True)
