"""Few-shot tasks: a support set to learn from, a query set of the same task to be scored on.

``Sinusoids``: y = A sin(x + φ), A uniform in 0.1–5, φ in 0–π, x in −5–5 (Finn et al. 2017, arXiv:1703.03400).
``Images``: N-way K-shot classification, the classes of a task drawn anew and labelled in random order, so that nothing
but the support tells which label means which class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from dynlm.labs.fewshot.characters import font_characters, hub_characters
from dynlm.settings import Bound, Seed, Settings, Size
from dynlm.types import InputError, Piece


class FewShotTask(NamedTuple):
    """``support`` and ``query``, each (inputs, targets)."""

    support: Piece
    query: Piece

    def minibatches(self, number: int, size: int, generator: torch.Generator) -> list[Piece]:
        """Minibatches of support and query together, each drawn without replacement."""
        axis = self.support[1].dim() - 2 if self.support[0].dim() == 3 else 0  # of the examples: tasks may be stacked
        inputs, targets = (torch.cat(parts, axis) for parts in zip(self.support, self.query, strict=True))
        chosen = [torch.randperm(inputs.shape[axis], generator=generator)[:size] for _ in range(number)]
        return [(inputs.index_select(axis, index), targets.index_select(axis, index)) for index in chosen]


class TaskSource(Protocol):
    """A distribution of tasks."""

    def sample(self, generator: torch.Generator) -> FewShotTask:
        """Return the next task; the generator alone decides which."""


class Sinusoids:
    """Regression of a sine of random amplitude and phase from ``shots`` points. Inputs and targets are (B, 1)."""

    def __init__(self, shots: int = 10, queries: int = 50) -> None:
        self.shots, self.queries = shots, queries

    def sample(self, generator: torch.Generator) -> FewShotTask:
        amplitude, phase = torch.rand(2, generator=generator).tolist()
        x_B1 = 10 * torch.rand(self.shots + self.queries, 1, generator=generator) - 5
        y_B1 = (0.1 + 4.9 * amplitude) * torch.sin(x_B1 + math.pi * phase)
        return FewShotTask(
            (x_B1[: self.shots], y_B1[: self.shots]),
            (x_B1[self.shots :], y_B1[self.shots :]),
        )


class Images:
    """N-way K-shot classification. ``images``: one (instances, side, side) tensor a class, values 0–1.

    Inputs are (B, 1, side, side), targets (B,); support and query never share an instance.
    """

    def __init__(self, images: list[Tensor], ways: int = 5, shots: int = 1, queries: int = 5) -> None:
        fewest = min((len(instances) for instances in images), default=0)
        if len(images) < ways:
            raise InputError(f"{len(images)} classes for {ways}-way tasks: lower ways", setting="fewshot.tasks.ways")
        if fewest < shots + queries:
            needed = f"shots {shots} + queries {queries}"
            message = f"a class has {fewest} instances, fewer than {needed}: lower queries"
            raise InputError(message, setting="fewshot.tasks.queries")
        self.images, self.ways, self.shots, self.queries = images, ways, shots, queries

    def sample(self, generator: torch.Generator) -> FewShotTask:
        support, query = [], []
        for index in torch.randperm(len(self.images), generator=generator)[: self.ways].tolist():
            instances = self.images[index]
            chosen = torch.randperm(len(instances), generator=generator)[: self.shots + self.queries]
            support.append(instances[chosen[: self.shots], None])
            query.append(instances[chosen[self.shots :], None])
        return FewShotTask(
            (torch.cat(support), torch.arange(self.ways).repeat_interleave(self.shots)),
            (torch.cat(query), torch.arange(self.ways).repeat_interleave(self.queries)),
        )


@dataclass(frozen=True)
class TasksConfig(Settings):
    """Which few-shot tasks."""

    kind: Literal["sinusoid", "characters"] = "sinusoid"
    """sinusoid: regression of a sine; characters: which of ``ways`` unseen characters is it"""
    shots: Size = 10
    """support examples: of the task (sinusoid), or a class (characters)"""
    queries: Size = 50
    """query examples: of the task (sinusoid), or a class (characters)"""
    ways: Size = 5
    """characters: classes a task"""
    source: str = "fonts"
    """characters: fonts, those that matplotlib ships; or hf:NAME, a Hugging Face data set of images and labels"""
    side: Annotated[int, Bound(4, 1024)] = 20
    """characters: pixels a side"""
    variants: Annotated[int, Bound(1, 1024)] = 2
    """characters: random transformations of each font's glyph"""
    seed: Seed = 0
    """of transformations and of the division of characters; tasks have their own"""


class TaskSplits(NamedTuple):
    """Sources of tasks to learn from, to choose settings with, and to report; their classes are disjoint."""

    train: TaskSource
    valid: TaskSource
    test: TaskSource


def load_tasks(config: TasksConfig) -> TaskSplits:
    """Return the three sources of tasks. Characters are divided 60 : 15 : 25."""
    if config.kind == "sinusoid":
        source = Sinusoids(config.shots, config.queries)
        return TaskSplits(source, source, source)
    if config.source == "fonts":
        characters = font_characters(config.side, config.variants, config.seed)
    elif config.source.startswith("hf:"):
        characters = hub_characters(config.source.removeprefix("hf:"), config.side)
    else:
        raise InputError(f"source {config.source!r}: choose fonts or hf:NAME", setting="fewshot.tasks.source")
    names = divide(list(characters), config.seed)
    sizes = config.ways, config.shots, config.queries
    return TaskSplits(*(Images([characters[name] for name in part], *sizes) for part in names))


def divide(classes: Sequence[str], seed: int) -> tuple[list[str], list[str], list[str]]:
    """Classes to train, validate and test with, 60 : 15 : 25, in random order."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [classes[i] for i in order]
    first, second = round(0.6 * len(classes)), round(0.75 * len(classes))
    return shuffled[:first], shuffled[first:second], shuffled[second:]
