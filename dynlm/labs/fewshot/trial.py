"""One method on few-shot tasks: learn the start θ0, tune the inner rate, test."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch

from dynlm.files import Json
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.labs.fewshot.evaluate import adapted, error_rate, mean_loss, mean_over_tasks, tune_rate
from dynlm.labs.fewshot.nets import (
    MLP,
    ConvNet,
    NetScorer,
    StackedScorer,
    cross_entropy,
    seeded,
    squared_error,
    stacked,
)
from dynlm.labs.fewshot.tasks import FewShotTask, TasksConfig, TaskSource, TaskSplits
from dynlm.meta.initialisation import Method, Task
from dynlm.meta.outer import OuterConfig, learn_start
from dynlm.models.params import adapted_parameters
from dynlm.optim.handmade import SGD
from dynlm.priors import make_priors
from dynlm.progress import Bar
from dynlm.settings import Count, NotEmpty, Positive, Seed, Settings, Size
from dynlm.types import InputError, Piece


@dataclass(frozen=True)
class FewShotConfig(Settings):
    """Learning a start for few-shot tasks with several methods, and comparing them with a jointly trained start."""

    methods: Annotated[tuple[str, ...], NotEmpty()] = ("joint", "maml", "fomaml", "reptile", "reptile-serial", "imaml")
    """methods to compare; joint is the baseline"""
    width: Size = 40
    """hidden units of the MLP's two layers (sinusoid), or channels of the four convolutions (characters)"""
    normalise: Literal["batch", "image"] = "batch"
    """characters: statistics over the images scored together (transductive), or over each image alone"""
    inner_lr: Positive = 0.02
    """learning rate of the inner loop while the start is learned (maml, fomaml, reptile)"""
    inner_steps: Count = 8
    """updates on the support while the start is learned (maml, fomaml)"""
    proximal: Positive = 1.0
    """imaml: λ, the pull of the inner loop towards θ0"""
    proximal_lr: Positive = 0.01
    """imaml: learning rate of the inner loop while the start is learned"""
    proximal_steps: Count = 32
    """imaml: updates that solve the proximal problem while the start is learned"""
    reptile_steps: Count = 32
    """reptile: updates on minibatches of the whole task"""
    reptile_batch: Size = 10
    """reptile: examples of such a minibatch"""
    test_steps: Count = 32
    """updates on the support in validation and test, for every method"""
    rates: Annotated[tuple[Positive, ...], NotEmpty()] = (0.005, 0.007, 0.01, 0.014, 0.02, 0.028, 0.04, 0.056, 0.08)
    """inner rates that are tried on validation tasks for each method, the joint start included"""
    valid_tasks: Size = 60
    """tasks for validation while training, and as many others to choose the rate with"""
    test_tasks: Size = 600
    """test tasks, the same for every method"""
    seed: Seed = 0
    """of the random start and of all tasks"""
    tasks: TasksConfig = field(default_factory=TasksConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)


METHODS: dict[str, Method] = {
    "joint": "joint",
    "maml": "maml",
    "fomaml": "fomaml",
    "reptile": "reptile",
    "reptile-serial": "reptile",
    "imaml": "imaml",
}


class Trial:
    """One method from the random start that all share to its test."""

    def __init__(self, config: FewShotConfig, name: str, splits: TaskSplits) -> None:
        self.config, self.name, self.method, self.splits = config, name, METHODS[name], splits
        regression = config.tasks.kind == "sinusoid"
        if regression:
            net = seeded(lambda: MLP((1, config.width, config.width, 1)), config.seed)
        else:
            net = seeded(lambda: ConvNet(config.tasks.ways, config.width, normalise=config.normalise), config.seed)
        parameters = adapted_parameters(net)
        priors = make_priors(parameters, [torch.ones_like(a.matrix_RC) for a in parameters])
        score = NetScorer(net, squared_error if regression else cross_entropy)
        rule = SGD(config.inner_lr)
        if self.method == "imaml":
            rule = SGD(config.proximal_lr, config.proximal_lr * config.proximal)
        self.reader = InnerLoop(net, score, rule, priors, ReadConfig(kernel="eager", trust=0))
        self.measure = mean_loss if regression else error_rate

    @property
    def inner_steps(self) -> int:
        """Updates of the inner loop while the start is learned."""
        config = self.config
        own = {"joint": 0, "imaml": config.proximal_steps, "reptile": config.reptile_steps}
        return own.get(self.method, config.inner_steps)

    def run(self) -> Json:
        """Train, tune, test; the learned start is in the reader's priors."""
        config, clock = self.config, time.process_time
        outer = config.outer
        if self.name == "reptile-serial":  # as many tasks, a step after each
            n = outer.tasks
            outer = dataclasses.replace(outer, steps=outer.steps * n, tasks=1, validate_every=outer.validate_every * n)
        marks = [clock()]
        best, best_step = self.train(outer)
        marks.append(clock())
        valid = tasks_of(self.splits.valid, config.valid_tasks, config.seed + 2)
        tuned = tune_rate(config.rates, lambda lr: self.mean(valid, lr))
        marks.append(clock())
        self.reader.rule.load_state_dict(SGD(tuned.lr).state_dict())  # plain SGD for every start
        test = tasks_of(self.splits.test, config.test_tasks, config.seed + 3)
        value, ci95 = mean_over_tasks(adapted(self.reader, test, config.test_steps, self.measure))
        marks.append(clock())
        seconds = {part: b - a for part, a, b in zip(("train", "tune", "test"), marks, marks[1:], strict=False)}
        if tuned.at_bound:
            print(f"{self.name}: inner rate {tuned.lr:g} is at the edge of fewshot.rates; a wider range may help")
        return {
            "error": value,
            "error_ci95": list(ci95),
            "test_tasks": config.test_tasks,
            "lr": tuned.lr,
            "valid_error": tuned.value,
            "valid_loss": best,
            "best_step": best_step,
            "cpu_seconds": {**seconds, "total": marks[-1] - marks[0]},
        }

    def train(self, outer: OuterConfig) -> tuple[float, int]:
        """Return (validation loss, step) of the start that was kept: after as many updates as in training."""
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        valid = tasks_of(self.splits.valid, self.config.valid_tasks, self.config.seed + 4)
        reader, copies = self.reader, outer.tasks if outer.stacked else 1
        if len(valid) < copies:
            message = f"valid_tasks is {len(valid)}: {copies} are read at once, give at least that"
            raise InputError(message, setting="fewshot.valid_tasks")
        if outer.stacked:
            reader, valid = self.stacked_reader(copies), stack_tasks(valid, copies)

        def sample() -> Task:
            tasks = [self.splits.train.sample(generator) for _ in range(copies)]
            return self.task(stack_tasks(tasks, copies)[0] if outer.stacked else tasks[0], generator)

        def validate() -> float:
            return mean_over_tasks(adapted(reader, valid, self.inner_steps, mean_loss)).value / copies

        with Bar(total=outer.steps, desc=self.name, unit="step") as bar:
            learned = learn_start(self.method, reader, sample, outer, validate, bar.update)
        for restart in learned.restarts:
            print(f"{self.name}: restarted from the best start with half the rate ({restart})")
        if outer.stacked:
            for prior, learned_prior in zip(self.reader.priors, reader.priors, strict=True):
                prior.theta0.copy_(learned_prior.theta0[0].view(prior.theta0.shape))
        return learned.best, learned.best_step

    def stacked_reader(self, copies: int) -> InnerLoop:
        """One reader of as many copies of the network as a step has tasks."""
        if not isinstance(self.reader.model, MLP):
            message = "stacked copies MLPs only (sinusoid): set it to false"
            raise InputError(message, setting="fewshot.outer.stacked")
        net = stacked(self.reader.model, copies)
        parameters = adapted_parameters(net)
        priors = make_priors(parameters, [torch.ones_like(a.matrix_RC) for a in parameters])
        return InnerLoop(net, StackedScorer(net, squared_error), self.reader.rule, priors, self.reader.config)

    def task(self, task: FewShotTask, generator: torch.Generator) -> Task:
        """Return what the method's inner loop reads of a training task."""
        config = self.config
        if self.method == "reptile":  # knows no query: learns from all of the task
            pieces = task.minibatches(self.inner_steps, config.reptile_batch, generator)
            return Task(pieces, [1.0] * len(pieces))
        return Task.few_shot(*task, self.inner_steps)

    def mean(self, tasks: list[FewShotTask], lr: float) -> float:
        """Return the measure on ``tasks`` after plain SGD at another rate."""
        self.reader.rule.load_state_dict(SGD(lr).state_dict())
        return mean_over_tasks(adapted(self.reader, tasks, self.config.test_steps, self.measure)).value


def stack_tasks(tasks: list[FewShotTask], copies: int) -> list[FewShotTask]:
    """Groups of ``copies`` tasks as one, a new first axis; what does not fill a group is left out."""
    groups = [tasks[i : i + copies] for i in range(0, len(tasks) - copies + 1, copies)]

    def stack(pieces: Sequence[Piece]) -> Piece:
        inputs, targets = zip(*pieces, strict=True)
        return torch.stack(inputs), torch.stack(targets)

    return [FewShotTask(stack([t.support for t in group]), stack([t.query for t in group])) for group in groups]


def tasks_of(source: TaskSource, number: int, seed: int) -> list[FewShotTask]:
    """Return a fixed list of tasks."""
    generator = torch.Generator().manual_seed(seed)
    return [source.sample(generator) for _ in range(number)]
