"""Observe a reader segment by segment, ask it about altered text, and watch for random numbers while it scores.

The audit (:mod:`dynlm.evaluation.audit`) is built from these. None of them trusts what a reader says of itself: they
see what the inner loop scores and what `read` returns, the logits that the model puts out, and the operations that
torch runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dynlm.data.segments import article_segments
from dynlm.inner import InnerLoop, Observer, Scored
from dynlm.types import InputError, TokenizedArticle

DRAWS = frozenset(
    (
        "native_dropout",
        "bernoulli",
        "bernoulli_",
        "rand",
        "rand_like",
        "randn",
        "randn_like",
        "randint",
        "randint_like",
        "uniform_",
        "normal",
        "normal_",
        "exponential_",
        "multinomial",
        "randperm",
        "random_",
    )
)
"""operations of torch that draw random numbers"""


class Note(Observer):
    """Calls ``note`` with every segment that a loop scores, and its distributions; None where it shows no logits."""

    def __init__(self, note: Callable[[Scored, Tensor | None], None]) -> None:
        self.note = note

    def scored(self, scored: Scored) -> None:
        assert scored.log_probs is not None  # an observed loop taps the model
        try:
            log_probs_SV = scored.log_probs()
        except InputError:
            log_probs_SV = None
        self.note(scored, log_probs_SV)


class Readout(NamedTuple):
    """A reading: its scores, and the distributions at chosen tokens."""

    losses_T: Tensor
    log_probs_V: Mapping[int, Tensor]
    """by token; empty for a model that shows no logits"""


def read(reader: InnerLoop, article: TokenizedArticle, start_id: int, rows: Collection[int] = ()) -> Readout:
    """Read ``article`` from the start, and keep the distributions of the tokens ``rows``."""
    kept: dict[int, Tensor] = {}
    place = 0

    def note(scored: Scored, log_probs_SV: Tensor | None) -> None:
        nonlocal place
        size = scored.targets_S.numel()
        if log_probs_SV is not None:
            kept.update({t: log_probs_SV[t - place].cpu() for t in rows if place <= t < place + size})
        place += size

    with reader, reader.observed_by(Note(note)) if rows else nullcontext():
        return Readout(reader.read(article, start_id).cpu(), kept)


def first_difference(a_T: Tensor, b_T: Tensor) -> int | None:
    """Return the first place at which two readings differ by a bit, None where they are the same."""
    if a_T.shape != b_T.shape:
        return min(a_T.numel(), b_T.numel())
    moved = (a_T != b_T).nonzero()
    return int(moved[0]) if moved.numel() else None


def altered(article: TokenizedArticle, position: int, vocab_size: int) -> TokenizedArticle:
    """Replace the tokens from ``position`` on by tokens drawn from the article's own; the first one surely differs."""
    return dataclasses.replace(
        article, ids_T=_altered(article.ids_T, position, _own(article.ids_T, vocab_size), position)
    )


def _own(ids_T: Tensor, vocab_size: int) -> Tensor:
    """Return the tokens that a text holds, or all there are where it holds but one."""
    own_N = ids_T.unique()
    return own_N if own_N.numel() > 1 else torch.arange(vocab_size)


def _altered(ids_T: Tensor, position: int, own_N: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids_T = ids_T.clone()
    first_N = own_N[own_N != ids_T[position]]
    ids_T[position:] = own_N[torch.randint(own_N.numel(), (ids_T.numel() - position,), generator=generator)]
    ids_T[position] = first_N[int(torch.randint(first_N.numel(), (), generator=generator))]
    return ids_T


class Altered(NamedTuple):
    """A score or distribution that an altered token moves although it comes no earlier than that token."""

    token: int
    changed: int
    distribution: bool
    """the distribution of token ``changed`` itself moved, so it knows its target"""


def ask_inside_segments(
    reader: InnerLoop, article: TokenizedArticle, start_id: int, places: Sequence[int], vocab_size: int
) -> tuple[Tensor, Altered | None]:
    """Read ``article``; before each segment, ask for its scores with the tokens from each of ``places`` on altered.

    After each question the reader is put back where it was. Returns the losses (T,) of the reading itself, which equal
    those of an undisturbed one where putting back works, and the first score that moved when it must not.
    """
    losses, found, own_N = list[Tensor](), None, _own(article.ids_T, vocab_size)
    device = reader.parameters[0].device
    segments = list(article_segments(article.ids_T.to(device), start_id, reader.config.segment))

    def ask(inputs_S: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor | None]:
        shown: list[Tensor | None] = []
        position = reader.snapshot()
        with reader.observed_by(Note(lambda scored, log_probs_SV: shown.append(log_probs_SV))):
            step = reader.segment(inputs_S, targets_S, True)
        reader.resume(position)
        return step.losses_S, shown[-1] if shown else None

    with reader:
        for number, (inputs_S, targets_S) in enumerate(segments):
            start = number * reader.config.segment
            inside = [place - start for place in places if start <= place < start + targets_S.numel()]
            base_S, base_SV = ask(inputs_S, targets_S) if inside and found is None else (targets_S, None)
            for place in inside if found is None else []:
                other_S = _altered(targets_S.cpu(), place, own_N, start + place).to(device)
                scores_S, scores_SV = ask(torch.cat([inputs_S[: place + 1], other_S[place:-1]]), other_S)
                moved = first_difference(base_S[:place], scores_S[:place])
                if moved is not None:
                    found = Altered(start + moved, start + place, False)
                elif (
                    base_SV is not None and scores_SV is not None and not torch.equal(base_SV[place], scores_SV[place])
                ):
                    found = Altered(start + place, start + place, True)
                if found is not None:
                    break
            last = number == len(segments) - 1 and reader.config.reset == "article"
            losses.append(reader.segment(inputs_S, targets_S, last).losses_S.cpu())
    return torch.cat(losses), found


def ask_vocabulary(
    reader: InnerLoop, article: TokenizedArticle, start_id: int, vocab_size: int, numbers: Collection[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Read ``article``; in the segments ``numbers``, ask for the score of every token of the vocabulary at each place.

    Yields (log_probs_SV, targets_S, losses_S): what was answered, and what the reading itself scored.
    """
    segments = list(article_segments(article.ids_T.to(reader.parameters[0].device), start_id, reader.config.segment))
    with reader:
        for number, (inputs_S, targets_S) in enumerate(segments):
            answers = []
            for token in range(vocab_size) if number in numbers else ():
                position = reader.snapshot()
                answers.append(-reader.segment(inputs_S, torch.full_like(targets_S, token), True).losses_S)
                reader.resume(position)
            last = number == len(segments) - 1 and reader.config.reset == "article"
            losses_S = reader.segment(inputs_S, targets_S, last).losses_S
            if answers:
                yield torch.stack(answers, 1), targets_S, losses_S


class Draws(TorchDispatchMode):
    """Inside, remember the first operation that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        if name in DRAWS or given.get("dropout_p"):
            self.found = self.found or name
        return func(*args, **(kwargs or {}))


@contextmanager
def training_modules(model: nn.Module) -> Iterator[list[str]]:
    """Inside, collect the names of modules that run in training mode."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: found.append(name) if module.training else None

    handles = [m.register_forward_pre_hook(look(name or type(model).__name__)) for name, m in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
