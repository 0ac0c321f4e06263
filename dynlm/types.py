"""Shared vocabulary: the shape legend, the one user-facing error, and the records that modules pass to each other.

Shape legend (suffixes of names, e.g. ``losses_S``):
    B  batch of parallel streams      T  tokens of one article       S  tokens of one segment
    V  vocabulary                     D  model width                 N  adapted weights
    R  rows, C  columns of a tensor seen as a matrix (a vector is one row)
    K  sampled coordinates            F  features of a cell          H  hidden units of a cell
Losses are nats (natural logarithm) unless a name says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

Piece = tuple[torch.Tensor, torch.Tensor]
"""(inputs_S, targets_S): what the inner loop scores between two updates."""


def perplexity(nats: float, count: float) -> float:
    """exp(nats / count): infinite where it would be beyond all numbers, as by the word of a text without blanks."""
    mean = nats / max(1, count)
    return math.exp(mean) if mean < 700 else math.inf


class InputError(ValueError):
    """Raised for invalid input. The message is one line: value, bound, next step. A command ends with exit code 2.

    Attributes:
        setting: what the next step changes, as recipes name it (``context.carry``); the command line prints its flag.
    """

    def __init__(self, message: str = "", *, setting: str = "") -> None:
        super().__init__(message)
        self.setting = setting


class DivergedError(InputError):
    """Raised where reading or training leaves the finite numbers: a search goes on without that setting."""


@dataclass(frozen=True)
class Article:
    """A unit of reading. Nothing of the source is dropped.

    Attributes:
        id: tells it from the others of its corpus; splits are drawn from it.
        title: shown in reports.
        text: ends with a newline.
    """

    id: str
    title: str
    text: str

    @property
    def n_words(self) -> int:
        """Whitespace-separated words plus one end-of-line a line (the WikiText convention)."""
        return len(self.text.split()) + self.text.count("\n")

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes."""
        return len(self.text.encode("utf-8"))


@dataclass(frozen=True)
class TokenizedArticle:
    """An article as token ids (T,), with the exact word and byte counts of its text."""

    id: str
    title: str
    ids_T: torch.Tensor
    n_words: int
    n_bytes: int

    def __len__(self) -> int:
        return self.ids_T.numel()
