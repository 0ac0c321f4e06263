"""The outer loop over starts: θ0, and if asked the rule's settings φ, follow a method's gradients; the best is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dynlm.adapt import Reader
from dynlm.meta.initialisation import Method, Task, add, outer_gradient
from dynlm.types import InputError


@dataclass(frozen=True)
class OuterConfig:
    """The outer loop: how θ0 (and φ) move."""

    steps: int = 1000
    """outer steps"""
    tasks: int = 4
    """tasks a step, whose gradients are averaged; 1 makes Reptile serial"""
    stacked: bool = False
    """all tasks of a step at once, in a model that holds a copy of θ for each (few-shot sinusoids)"""
    optimizer: Literal["adam", "sgd"] = "adam"
    """sgd with lr ε is Reptile's own step θ0 + ε mean(θ_k − θ0)"""
    lr: float = 1e-3
    """learning rate of θ0"""
    clip: float = 0.0
    """bound on the norm of the gradient of θ0; 0 leaves it"""
    phi_lr: float = 0.0
    """learning rate of the rule's settings φ, with the same optimizer; 0 leaves them as they are"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine falls to zero over the steps"""
    cg_steps: int = 5
    """imaml: conjugate-gradient steps"""
    validate_every: int = 200
    """steps between validations; the best start is kept"""


class OuterProgress(NamedTuple):
    """``best``: validation value of the start that was kept, found at step ``best_step``; smaller is better."""

    best: float
    best_step: int
    train_losses: list[float]
    """mean outer loss of each step"""
    valid: list[tuple[int, float]]
    stopped: str = ""
    """why it ended before its last step: an inner loop that ran away"""


def learn_start(
    method: Method,
    reader: Reader,
    sample: Callable[[], Task],
    config: OuterConfig,
    validate: Callable[[], float],
    progress: Callable[[int], object] | None = None,
) -> OuterProgress:
    """Learn θ0 in ``reader.priors`` (a copy of those it came with) and, with ``phi_lr``, the rule's settings.

    ``validate`` reads with ``reader`` and returns a number to keep low; the start where it was lowest is kept.
    """
    reader.priors = [prior._replace(theta0=prior.theta0.clone()) for prior in reader.priors]
    theta0 = [prior.theta0 for prior in reader.priors]
    phi = list(reader.rule.parameters()) if config.phi_lr else []
    outer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.optimizer](theta0, lr=config.lr)
    if phi:
        outer.add_param_group({"params": phi, "lr": config.phi_lr})
    rates = [group["lr"] for group in outer.param_groups]
    kept: list[Tensor] = []
    result = OuterProgress(math.inf, -1, [], [])
    for step in range(config.steps + 1):
        if step % config.validate_every == 0 or step == config.steps:
            value = validate()
            result.valid.append((step, value))
            if value < result.best or not kept:
                kept = [t.detach().clone() for t in (*theta0, *phi)]
                result = result._replace(best=value, best_step=step)
        if step == config.steps:
            break
        share = 0.5 + 0.5 * math.cos(math.pi * step / config.steps) if config.schedule == "cosine" else 1.0
        for group, rate in zip(outer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        try:
            result.train_losses.append(_outer_step(method, reader, sample, config, outer))
        except InputError as error:  # what was learned before is kept
            if step == 0:
                raise
            result = result._replace(stopped=f"stopped at step {step}: {error}")
            break
        if progress:
            progress(1)
    with torch.no_grad():
        for tensor, best in zip((*theta0, *phi), kept, strict=True):
            tensor.copy_(best)
    reader.begin()
    return result


def _outer_step(
    method: Method, reader: Reader, sample: Callable[[], Task], config: OuterConfig, outer: torch.optim.Optimizer
) -> float:
    outer.zero_grad(set_to_none=True)
    theta0 = [prior.theta0 for prior in reader.priors]
    phi = list(reader.rule.parameters()) if config.phi_lr else []
    total, sums = 0.0, [torch.zeros_like(t) for t in theta0]
    for _ in range(1 if config.stacked else config.tasks):
        loss, grads = outer_gradient(method, reader, sample(), phi, config.cg_steps)
        total += loss / config.tasks
        if config.stacked:  # a row a task: all copies of θ0 get the mean, and stay equal
            grads = [grad.sum(0, keepdim=True).expand_as(grad) for grad in grads]
        add(sums, grads, 1 / config.tasks)
    for tensor, grad in zip(theta0, sums, strict=True):
        tensor.grad = grad
    if config.clip:
        torch.nn.utils.clip_grad_norm_(theta0, config.clip)
    for meta_parameter in phi:
        if meta_parameter.grad is not None:
            meta_parameter.grad /= config.tasks
    outer.step()
    return total
