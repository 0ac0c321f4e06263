"""The outer loop over starts: θ0, and if asked the rule's settings φ, follow a method's gradients; the best is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dynlm.checkpoints import fitting, load_optimizer, optimizer_tensors, step_of
from dynlm.files import Json, require_layout
from dynlm.inner import InnerLoop
from dynlm.meta.forward import add_gradients
from dynlm.meta.initialisation import Method, Task, add, outer_gradient
from dynlm.processes import spread
from dynlm.settings import AnyFloat, Count, NotNegative, Positive, Settings, Size, build
from dynlm.tracking import Track, untracked
from dynlm.types import DivergedError


@dataclass(frozen=True)
class OuterConfig(Settings):
    """The outer loop: how θ0 (and φ) move."""

    steps: Count = 1000
    """outer steps"""
    tasks: Size = 4
    """tasks a step, whose gradients are averaged; 1 makes Reptile serial"""
    stacked: bool = False
    """all tasks of a step at once, in a model that holds a copy of θ for each (few-shot sinusoids)"""
    optimizer: Literal["adam", "sgd"] = "adam"
    """sgd with lr ε is Reptile's own step θ0 + ε mean(θ_k − θ0)"""
    lr: Positive = 1e-3
    """learning rate of θ0"""
    clip: NotNegative = 0.0
    """bound on the norm of the gradient of θ0; 0 leaves it"""
    phi_lr: NotNegative = 0.0
    """learning rate of the rule's settings φ, with the same optimizer; 0 leaves them as they are"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine falls to zero over the steps"""
    cg_steps: Count = 5
    """imaml: conjugate-gradient steps"""
    validate_every: Count = 200
    """steps between validations; the best start is kept"""


MOST_RESTARTS = 6


class OuterProgress(NamedTuple):
    """``best``: validation value of the start that was kept, found at step ``best_step``; smaller is better."""

    best: AnyFloat
    best_step: int
    train_losses: list[AnyFloat]
    """mean outer loss of each step"""
    valid: list[tuple[int, AnyFloat]]
    restarts: list[str]
    """steps where an inner loop ran away: each time the best start came back, and the rates were halved"""


Checkpoint = tuple[dict[str, Tensor], Json]


def learn_start(
    method: Method,
    reader: InnerLoop,
    sample: Callable[[], Task],
    config: OuterConfig,
    validate: Callable[[], float],
    progress: Callable[[int], object] | None = None,
    *,
    keep: Callable[[Checkpoint], object] | None = None,
    resume: Checkpoint | None = None,
    track: Track = untracked,
) -> OuterProgress:
    """Learn θ0, that of ``reader.priors``, in place and, with ``phi_lr``, the rule's settings.

    ``validate`` reads with ``reader`` and returns a number to keep low; the start where it was lowest is kept.
    Methods that take the inner loop's end for exact (FOMAML, iMAML) drive θ0 to where the inner rate is too high: then
    the best start so far is taken up again with half the outer rate. ``keep`` gets a checkpoint after each validation,
    ``resume`` is one to go on from; where ``sample`` stands is the caller's to keep. ``track`` gets the outer loss of
    each step and the value of each validation.

    Raises:
        DivergedError: an inner loop that diverges in the first step. The seventh later on ends the loop.
    """
    loop = _Loop(reader, config)
    if resume:
        loop.load(resume)
    first = loop.step
    for step in range(first, config.steps + 1):
        if (step % config.validate_every == 0 or step == config.steps) and (step != first or not resume):
            loop.validated(step, value := _value(validate, step))
            track({"valid": value}, step)
            if keep:
                keep(loop.state())
        if step == config.steps:
            break
        loop.set_rate(step)
        try:
            loss = _outer_step(method, reader, sample, config, loop.outer)
        except DivergedError as error:
            if step == 0:
                raise
            loop.result.restarts.append(f"step {step}: {error}")
            if len(loop.result.restarts) > MOST_RESTARTS:
                break
            loop.restore()
            loop.outer = _optimizer(reader, config)
        else:
            loop.result.train_losses.append(loss)
            track({"train": loss}, step + 1)
        if progress:
            progress(1)
    loop.restore()
    reader.begin()
    return loop.result


class _Loop:
    """Where the outer loop stands: what is learned, the best of it so far, its optimizer, and how it went."""

    def __init__(self, reader: InnerLoop, config: OuterConfig) -> None:
        self.config, self.step = config, 0
        self.learned = [prior.theta0 for prior in reader.priors] + (
            list(reader.rule.parameters()) if config.phi_lr else []
        )
        self.outer, self.kept = _optimizer(reader, config), [t.detach().clone() for t in self.learned]
        self.result = OuterProgress(math.inf, -1, [], [], [])

    def validated(self, step: int, value: float) -> None:
        self.step = step
        self.result.valid.append((step, value))
        if value < self.result.best:
            self.kept = [t.detach().clone() for t in self.learned]
            self.result = self.result._replace(best=value, best_step=step)

    def set_rate(self, step: int) -> None:
        """The schedule, halved at every restart."""
        cosine = self.config.schedule == "cosine"
        share = 0.5 + 0.5 * math.cos(math.pi * step / self.config.steps) if cosine else 1.0
        for group in self.outer.param_groups:
            group["lr"] = group["initial_lr"] * share * 0.5 ** len(self.result.restarts)

    @torch.no_grad()
    def restore(self) -> None:
        """The best start comes back."""
        for tensor, best in zip(self.learned, self.kept, strict=True):
            tensor.copy_(best)

    def state(self) -> Checkpoint:
        """Return all of it for a checkpoint."""
        tensors = {f"learned.{i}": t for i, t in enumerate(self.learned)}
        tensors |= {f"kept.{i}": t for i, t in enumerate(self.kept)}
        return tensors | optimizer_tensors(self.outer), {"step": self.step, "result": self.result._asdict()}

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """The counterpart of :meth:`state`."""
        tensors, meta = checkpoint
        with fitting():
            layout = {f"{part}.{i}": t for i, t in enumerate(self.learned) for part in ("learned", "kept")}
            own = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in ("learned", "kept")}
            require_layout("it", own, layout, advice="")
            step, result = step_of(meta, self.config.steps), build(OuterProgress, meta.get("result"), "result")
            for i, (learned, kept) in enumerate(zip(self.learned, self.kept, strict=True)):
                learned.copy_(tensors[f"learned.{i}"])
                kept.copy_(tensors[f"kept.{i}"])
            load_optimizer(self.outer, tensors)
            self.step, self.result = step, result


def _value(validate: Callable[[], float], step: int) -> float:
    """Refuse as a candidate a start from which reading runs away; the first one must read."""
    try:
        return validate()
    except DivergedError:
        if step == 0:
            raise
        return math.inf


def _optimizer(reader: InnerLoop, config: OuterConfig) -> torch.optim.Optimizer:
    groups = [{"params": [prior.theta0 for prior in reader.priors], "lr": config.lr, "initial_lr": config.lr}]
    if config.phi_lr:
        phi = list(reader.rule.parameters())
        groups.append({"params": phi, "lr": config.phi_lr, "initial_lr": config.phi_lr})
    if config.optimizer == "adam":
        return torch.optim.Adam(groups)
    return torch.optim.SGD(groups)


def _outer_step(
    method: Method, reader: InnerLoop, sample: Callable[[], Task], config: OuterConfig, outer: torch.optim.Optimizer
) -> float:
    theta0 = [prior.theta0 for prior in reader.priors]
    phi = list(reader.rule.parameters()) if config.phi_lr else []
    tasks = [sample() for _ in range(1 if config.stacked else config.tasks)]

    def work(i: int) -> tuple[float, list[Tensor], list[Tensor | None]]:
        """Return loss, gradient of θ0 and of φ of one task."""
        outer.zero_grad(set_to_none=True)
        loss, grads = outer_gradient(method, reader, tasks[i], phi, config.cg_steps)
        return loss, grads, [p.grad for p in phi]

    total, sums = 0.0, [torch.zeros_like(t) for t in theta0]
    gradients = spread(work, [float(len(task.pieces)) for task in tasks])
    outer.zero_grad(set_to_none=True)
    for loss, grads, phi_grads in gradients:
        total += loss / config.tasks
        if config.stacked:  # a row a task: all copies of θ0 get the mean, and stay equal
            grads = [grad.sum(0, keepdim=True).expand_as(grad) for grad in grads]
        add(sums, [grad.to(theta) for grad, theta in zip(grads, theta0, strict=True)], 1 / config.tasks)
        add_gradients(phi, phi_grads)
    for tensor, grad in zip(theta0, sums, strict=True):
        tensor.grad = grad
    if config.clip:
        torch.nn.utils.clip_grad_norm_(theta0, config.clip)
    for meta_parameter in phi:
        if meta_parameter.grad is not None:
            meta_parameter.grad /= config.tasks
    outer.step()
    return total
