"""Meta-training of a general-purpose rule on a family of small training tasks (dynlm.labs.general.tasks).

Evolution strategies over whole trainings: each outer step draws tasks, trains each network from the same start on the
same batches with φ + ε and with φ − ε, and moves φ by what the final losses say (antithetic pairs; Metz et al. 2019,
arXiv:1810.10180). Nothing is truncated. Why not a meta-gradient: the first-order one does not know that a step changes
the gradients that follow; on whole trainings it drives the momentum up until they fail (docs/LOG.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dynlm.changes import changing
from dynlm.checkpoints import (
    load_optimizer,
    log_of,
    optimizer_layout,
    optimizer_tensors,
    progress_of,
    resuming,
    write_log,
)
from dynlm.files import Json, read_tensors, require_layout, write_tensors
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.labs.general.tasks import TaskConfig, TrainingTask, sample_task
from dynlm.meta.train import MetaProgress, SaveRule, set_rate
from dynlm.models.params import adapted_parameters
from dynlm.optim.base import Prior, Rule
from dynlm.optim.general import General, GeneralConfig
from dynlm.processes import count, require_work, spread
from dynlm.progress import Bar
from dynlm.runs import Run
from dynlm.settings import Count, Positive, Seed, Settings, Size, as_json
from dynlm.tracking import Track, untracked
from dynlm.types import DivergedError

VALIDATION_SEED = 10**9
"""of the first meta-validation task: training tasks have smaller seeds"""
FLOOR = 1e-3
"""of the first loss: below it a loss counts as this"""


@dataclass(frozen=True)
class GeneralMetaConfig(Settings):
    """Meta-training of the general-purpose rule."""

    steps: Count = 300
    """updates of φ"""
    pairs: Size = 12
    """tasks an update, each trained twice, with φ + ε and φ − ε"""
    sigma: Positive = 0.1
    """standard deviation of ε"""
    lr: Positive = 3e-2
    """peak of Adam's learning rate on φ; cosine to zero over the steps"""
    fixed: tuple[str, ...] = ("tensor_weight", "tensor_to_hidden", "input_weight")
    """meta-parameters that keep their random start (globs): hidden layers, whose read-outs are learned"""
    validate_every: Count = 20
    """steps between trainings of the meta-validation tasks; each writes a checkpoint"""
    validation_tasks: Size = 24
    seed: Seed = 0
    family: TaskConfig = field(default_factory=TaskConfig)


class Rollout(NamedTuple):
    """How a training went: mean loss of each step, and whether it ended early because a loss was not finite."""

    losses_T: list[float]
    diverged: bool


def blank_priors(task: TrainingTask) -> list[Prior]:
    """Priors for a rule that uses none: the network's present weights."""
    adapted = adapted_parameters(task.net)
    return [Prior(a.name, theta := a.matrix_RC.clone(), theta, 1.0, 1.0) for a in adapted]


def train_task(rule: Rule, task: TrainingTask, seed: int) -> Rollout:
    """Train the task's network over its horizon. The network keeps its trained weights."""
    # blank priors know no usual size of a gradient
    reader, losses = InnerLoop(task.net, task.score, rule, blank_priors(task), ReadConfig(trust=0)), list[float]()
    reader.begin()
    for piece in task.pieces(task.horizon, seed):
        try:
            losses.append(float(reader.segment(*piece).losses_S.mean()))
        except DivergedError:
            return Rollout(losses, True)
    return Rollout(losses, False)


def outcome(rollout: Rollout) -> float:
    """How bad a training was: log of last to first loss, with a share of all losses on the way. A divergence: 1."""
    if rollout.diverged:
        return 1.0
    losses_T = torch.tensor(rollout.losses_T, dtype=torch.float64)
    last = losses_T[-max(1, len(losses_T) // 10) :].mean()
    eighths = torch.stack([part.mean() for part in losses_T.chunk(8)])
    final, on_the_way = ((x / losses_T[0]).clamp(min=FLOOR).log() for x in (last, eighths))
    return min(1.0, float(0.75 * final + 0.25 * on_the_way.mean()))


class Job(NamedTuple):
    """One training: φ as a vector, the rule's configuration, the task's seed."""

    phi: Tensor
    rule: GeneralConfig
    seed: int
    family: TaskConfig
    validate: bool = False
    """give log(last / first held-out loss) instead of :func:`outcome`"""


def work(job: Job) -> float:
    """Train and judge."""
    torch.set_num_threads(1)  # such small networks lose by threads
    rule, task = General(job.rule), sample_task(job.seed, job.family)
    vector_to_parameters(job.phi, rule.parameters())
    first = task.validate() if job.validate else 0.0
    rollout = train_task(rule, task, job.seed)
    if not job.validate:
        return outcome(rollout)
    last = math.nan if rollout.diverged else task.validate()
    return max(math.log(max(last, 1e-30) / first), math.log(FLOOR)) if math.isfinite(last) else 1.0


class GeneralTrainer:
    """φ, its optimizer, and how far they are. ``best`` is the lowest :meth:`validate` so far."""

    def __init__(self, rule: General, config: GeneralMetaConfig) -> None:
        self.rule, self.config = rule, config
        self.phi = parameters_to_vector(p.detach() for p in rule.parameters()).requires_grad_()
        moving = [not any(fnmatchcase(name, glob) for glob in config.fixed) for name, _ in rule.named_parameters()]
        parts = zip(rule.parameters(), moving, strict=True)
        self.sigma = torch.cat([torch.full((p.numel(),), config.sigma * moves) for p, moves in parts])
        self.optimizer = torch.optim.Adam([self.phi], lr=config.lr, betas=(0.9, 0.95))
        self.progress, self.records = MetaProgress(), list[Json]()
        require_work(config.pairs, "general.pairs")

    def step(self) -> float:
        """Train the step's tasks and update φ; returns their mean outcome."""
        config, step = self.config, self.progress.step
        generator = torch.Generator().manual_seed(config.seed * config.steps + step)
        seeds = [(config.seed * config.steps + step) * config.pairs + i for i in range(config.pairs)]
        noise = self.sigma * torch.randn(config.pairs, len(self.sigma), generator=generator)
        phi = self.phi.detach()
        jobs = [self._job(phi + sign * e, seed) for e, seed in zip(noise, seeds, strict=True) for sign in (1, -1)]
        plus, minus = torch.tensor(self._run(jobs)).view(-1, 2).unbind(1)
        difference = (plus - minus).clamp(-0.5, 0.5)  # no task speaks louder than the others
        direction = noise / self.sigma.square().clamp(min=1e-12)
        self.phi.grad = (difference[:, None] * direction).mean(0) / 2
        set_rate(self.optimizer, config.lr, step, config.steps)
        self.optimizer.step()
        vector_to_parameters(self.phi.detach(), self.rule.parameters())
        self.progress = self.progress._replace(step=step + 1)
        return float(plus.mean() + minus.mean()) / 2

    def validate(self) -> float:
        """Mean over fixed tasks of log(last / first held-out loss)."""
        seeds = range(VALIDATION_SEED, VALIDATION_SEED + self.config.validation_tasks)
        results = self._run([self._job(self.phi.detach(), seed)._replace(validate=True) for seed in seeds])
        return sum(results) / len(results)

    def _job(self, phi: Tensor, seed: int) -> Job:
        return Job(phi, self.rule.config, seed, self.config.family)

    def _run(self, jobs: Sequence[Job]) -> list[float]:
        """Return what each training gives; several processes share them by their steps."""
        steps = [float(sample_task(job.seed, job.family).horizon) for job in jobs] if count() > 1 else [1.0] * len(jobs)
        return spread(lambda i: work(jobs[i]), steps)

    def state(self) -> tuple[dict[str, Tensor], Json]:
        tensors = {"phi": self.phi, **optimizer_tensors(self.optimizer)}
        settings = as_json(self.config)
        return tensors, {"progress": self.progress._asdict(), "config": settings, "log": self.records}

    def load(self, tensors: dict[str, Tensor], meta: Json) -> None:
        with resuming(meta, self.config, "general"):
            progress, records = progress_of(MetaProgress, meta, self.config.steps), log_of(meta)
            layout = {"phi": self.phi, **optimizer_layout(self.optimizer, tensors)}
            require_layout("it", tensors, layout, advice="")
            with torch.no_grad():
                self.phi.copy_(tensors["phi"])
            load_optimizer(self.optimizer, tensors)
            vector_to_parameters(self.phi.detach(), self.rule.parameters())
            self.progress, self.records = progress, records


def meta_train_general(
    trainer: GeneralTrainer, run: Run, save: SaveRule, resume: bool = False, *, track: Track = untracked
) -> MetaProgress:
    """Train φ until the steps are done; ``save`` gets the rule at each validation.

    What it writes through the changes that it gets, the log and the checkpoint change together. ``track`` gets the
    outcome of each step and of each validation.

    The last rule counts, not the one that validates best: a few dozen tasks cannot tell them apart (docs/LOG.md).
    """
    config, path = trainer.config, run.checkpoint("learn-optimizer")
    validated = None
    if resume:
        trainer.load(*read_tensors(path))
        validated = trainer.progress.step
    started, outcomes = time.perf_counter() - trainer.progress.seconds, list[float]()
    with Bar(total=config.steps, initial=trainer.progress.step, desc="learn-optimizer", unit="step") as bar:
        while True:
            step = trainer.progress.step
            if step != validated and (step % config.validate_every == 0 or step == config.steps):
                valid, best = trainer.validate(), trainer.progress.best
                trainer.progress = MetaProgress(step, min(valid, best), 0, time.perf_counter() - started)
                mean = sum(outcomes) / len(outcomes) if outcomes else None
                record = {"step": step, "train": mean, "valid": valid, "seconds": round(trainer.progress.seconds, 1)}
                trainer.records.append(record)
                with changing(run.path) as new:
                    save(trainer.rule, trainer.progress, new)
                    write_log(new.at(run.log("learn-optimizer")), trainer.records)
                    write_tensors(new.at(path), *trainer.state())
                track({"valid": valid}, step)
                bar.write(f"step {step}: mean log(last / first held-out loss) {valid:.4f}")
                outcomes = []
            if step == config.steps:
                return trainer.progress
            outcomes.append(trainer.step())
            track({"train": outcomes[-1]}, step + 1)
            bar.set_postfix_str(f"training {outcomes[-1]:.3f}")
            bar.update()
