"""Training tasks: a small network, what it learns, how long. A family to sample from, and held-out ones to report on.

:func:`sample_task` draws the family's tasks, of up to 20,000 weights and about a millisecond a step: architecture,
data, sizes, start, batch size, scale of the loss and of single tensors, noise and horizon. :data:`HELD_OUT` has
architectures and data that the family never has, and larger networks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from dynlm.labs.fewshot.nets import Losses, cross_entropy, seeded, squared_error
from dynlm.labs.general import exercises, nets
from dynlm.labs.general.exercises import Draw, GlyphNoise, Spectrum, SplitText, Transduction, generator_of
from dynlm.models.params import adapted_parameters
from dynlm.settings import Count, Settings, Size
from dynlm.types import InputError, Piece

VALID_SEED = 1 << 40
"""of the batches to validate with: training batches have other seeds"""


class TaskScorer:
    """Losses of a network that computes with s·θ, s a constant a tensor, times a constant. No hidden state.

    The network's tensors are exchanged while it runs, whatever they are at that time (see ``params.pointed``).
    """

    def __init__(self, net: nn.Module, losses: Losses, factor: float = 1.0, scales: Sequence[float] = ()) -> None:
        self.net, self.losses, self.factor = net, losses, factor
        places = [a.places[0] for a in adapted_parameters(net)]
        self.scaled = [(place, s) for place, s in zip(places, scales, strict=True) if s != 1] if scales else []

    def __call__(self, inputs_S: Tensor, targets_S: Tensor, hidden: Any) -> tuple[Tensor, None]:
        outputs = self._scaled(inputs_S) if self.scaled else self.net(inputs_S)
        losses_S = self.losses(outputs, targets_S)
        return losses_S if self.factor == 1 else self.factor * losses_S, None

    def _scaled(self, inputs_S: Tensor) -> Tensor:
        tensors = [place.owner._parameters[place.name] for place, _ in self.scaled]
        try:
            for (place, scale), tensor in zip(self.scaled, tensors, strict=True):
                assert tensor is not None
                place.owner._parameters[place.name] = scale * tensor  # type: ignore[assignment]  # as params does
            outputs: Tensor = self.net(inputs_S)
            return outputs
        finally:
            for (place, _), tensor in zip(self.scaled, tensors, strict=True):
                place.owner._parameters[place.name] = tensor


class TrainingTask(NamedTuple):
    """What an optimizer is tried on. ``score(inputs, targets, None)`` gives one loss an example or token, and None."""

    name: str
    net: nn.Module
    score: TaskScorer
    pieces: Callable[[int, int], list[Piece]]
    """``pieces(n, seed)``: n random training batches; the same seed gives the same ones"""
    valid: list[Piece]
    """fixed batches that training never sees"""
    horizon: int
    """training steps"""

    @property
    def n_weights(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss on the held-out batches."""
        losses = torch.cat([self.score(inputs, targets, None)[0] for inputs, targets in self.valid])
        return float(losses.mean())


@dataclass(frozen=True)
class TaskConfig(Settings):
    """Which tasks are sampled."""

    families: tuple[str, ...] = ()
    """names of FAMILIES; empty: all of them, each as often"""
    min_steps: Count = 50
    """horizons are log-uniform from here"""
    max_steps: Count = 1000
    """to here"""
    augment: bool = True
    """random scales of the loss and of single tensors, and label noise"""
    valid_batches: Size = 4
    """held-out batches a task"""
    valid_size: Size = 64
    """examples of one"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.families) - set(FAMILIES)):
            raise InputError(f"families names {unknown[0]!r}: choose from {', '.join(FAMILIES)}")
        if self.min_steps > self.max_steps:
            raise InputError(f"min_steps is {self.min_steps}: expected at most max_steps, {self.max_steps}")


class Dice(random.Random):
    """Random settings, by the seed alone."""

    def log_uniform(self, low: float, high: float) -> float:
        return low * math.exp(self.random() * math.log(high / low))

    def size(self, low: int, high: int, multiple: int = 1) -> int:
        """Log-uniform whole number, a multiple of ``multiple``."""
        return max(multiple, multiple * round(self.log_uniform(low, high) / multiple))

    def maybe(self, share: float, low: float, high: float, otherwise: float) -> float:
        """Log-uniform in a ``share`` of cases. Advances the same in all."""
        value = self.log_uniform(low, high)
        return value if self.random() < share else otherwise


class Problem(NamedTuple):
    """A task before its augmentations: how to make the network, its losses, its examples, a batch's size."""

    make: Callable[[], nn.Module]
    losses: Losses
    draw: Draw
    batch: int


def last_cross_entropy(scores_BSV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return (B · T,) in nats: of the last T ids of each sequence."""
    scores_BTV = scores_BSV[:, -targets_BT.shape[1] :]
    return F.cross_entropy(scores_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")


def pixel_cross_entropy(logits_BP: Tensor, pixels_BP: Tensor) -> Tensor:
    """Return (B,) mean over pixels, of standardised pixels brought back to 0–1."""
    ink = exercises.INK[0] + exercises.INK[1] * pixels_BP
    return F.binary_cross_entropy_with_logits(logits_BP, ink.clamp(0, 1), reduction="none").mean(1)


def _sizes(dice: Dice, inputs: int, outputs: int, widest: int) -> list[int]:
    width = dice.size(12, widest)
    return [inputs, *[width] * dice.randint(1, 3), outputs]


def _perceptron(dice: Dice, inputs: int, outputs: int, widest: int = 64) -> Callable[[], nn.Module]:
    sizes = _sizes(dice, inputs, outputs, widest)
    activation, normalise = dice.choice(get_args(nets.Activation)), dice.random() < 0.3
    return lambda: nets.Perceptron(sizes, activation, normalise)


def _glyphs(dice: Dice, noisy: bool, reconstruct: bool = False) -> tuple[Draw, int, int]:
    """Some digits, their number, the side of their images."""
    side, ways = dice.choice((8, 10, 12)), dice.randint(3, 10)
    symbols = "".join(sorted(dice.sample(exercises.DIGITS, ways)))
    noise = GlyphNoise(dice.log_uniform(0.05, 1), dice.maybe(0.3 * noisy, 0.05, 0.4, 0))
    return exercises.glyph_classes(symbols, side, noise, reconstruct), ways, side


def _mlp_digits(dice: Dice, noisy: bool) -> Problem:
    draw, ways, side = _glyphs(dice, noisy)
    return Problem(_perceptron(dice, side * side, ways, 96), cross_entropy, draw, dice.size(8, 64))


def _cnn_digits(dice: Dice, noisy: bool) -> Problem:
    draw, ways, side = _glyphs(dice, noisy)
    widths = [dice.size(6, 20)] * dice.randint(2, 3)
    activation, normalise = dice.choice(get_args(nets.Activation)), dice.random() < 0.5
    make = lambda: nets.Convolutional(side, widths, ways, activation, normalise)  # noqa: E731
    return Problem(make, cross_entropy, draw, dice.size(8, 32))


def _autoencoder(dice: Dice, noisy: bool) -> Problem:
    draw, _, side = _glyphs(dice, noisy, reconstruct=True)
    hidden, code = [dice.size(16, 64)] * dice.randint(0, 2), dice.size(4, 24)
    activation, losses = dice.choice(get_args(nets.Activation)), dice.choice((squared_error, pixel_cross_entropy))
    return Problem(lambda: nets.Autoencoder(side * side, hidden, code, activation), losses, draw, dice.size(8, 64))


def _gru(dice: Dice, vocabulary: int) -> Callable[[], nn.Module]:
    width = dice.size(8, 40, 4)
    return lambda: nets.GRULanguageModel(vocabulary, width)


def _transformer(dice: Dice, vocabulary: int, length: int) -> Callable[[], nn.Module]:
    width, heads, layers = dice.size(8, 32, 4), dice.choice((1, 2, 4)), dice.choice((1, 1, 1, 2))
    return lambda: nets.TransformerLanguageModel(vocabulary, width, layers, heads, length)


def _text(dice: Dice) -> tuple[Draw, int, int, int]:
    """Windows of text, the vocabulary, their length, how many a batch."""
    corpus, length = exercises.documentation(), dice.size(12, 28)
    return exercises.text_windows(corpus, length), corpus.vocabulary, length, dice.size(4, 16)


def _gru_text(dice: Dice, noisy: bool) -> Problem:
    draw, vocabulary, _, batch = _text(dice)
    return Problem(_gru(dice, vocabulary), last_cross_entropy, draw, batch)


def _transformer_text(dice: Dice, noisy: bool) -> Problem:
    draw, vocabulary, length, batch = _text(dice)
    return Problem(_transformer(dice, vocabulary, length), last_cross_entropy, draw, batch)


def _sequences(dice: Dice) -> tuple[Draw, int, int]:
    """Sequences and their images, the vocabulary, the length of both together."""
    kind, symbols = dice.choice(get_args(Transduction)), dice.randint(4, 16)
    length = dice.randint(2, 4) if kind == "add" else dice.randint(3, 8)
    return exercises.transductions(kind, symbols, length), symbols + 1, length * (3 if kind == "add" else 2)


def _gru_sequence(dice: Dice, noisy: bool) -> Problem:
    draw, vocabulary, _ = _sequences(dice)
    return Problem(_gru(dice, vocabulary), last_cross_entropy, draw, dice.size(8, 32))


def _transformer_sequence(dice: Dice, noisy: bool) -> Problem:
    draw, vocabulary, length = _sequences(dice)
    return Problem(_transformer(dice, vocabulary, length), last_cross_entropy, draw, dice.size(8, 32))


def _mlp_teacher(dice: Dice, noisy: bool) -> Problem:
    inputs, outputs = dice.size(2, 24), dice.size(1, 4)
    sizes = _sizes(dice, inputs, outputs, 24)
    draw = exercises.teacher(sizes, dice.maybe(0.5, 0.03, 1, 0), generator_of(dice.getrandbits(32)))
    return Problem(_perceptron(dice, inputs, outputs, 96), squared_error, draw, dice.size(8, 64))


def _mlp_sinusoids(dice: Dice, noisy: bool) -> Problem:
    inputs, noise = dice.randint(1, 2), dice.maybe(0.5, 0.03, 1, 0)
    draw = exercises.sinusoids(dice.randint(1, 4), inputs, noise, generator_of(dice.getrandbits(32)))
    return Problem(_perceptron(dice, inputs, 1, 96), squared_error, draw, dice.size(8, 64))


def _linear(dice: Dice, classes: int) -> Problem:
    spectrum = Spectrum(dice.size(20, 150), dice.log_uniform(1, 100))
    draw = exercises.linear(spectrum, classes, dice.log_uniform(0.01, 1), generator_of(dice.getrandbits(32)))
    losses = cross_entropy if classes > 1 else squared_error
    return Problem(lambda: nets.Perceptron([spectrum.inputs, classes]), losses, draw, dice.size(8, 64))


FAMILIES: dict[str, Callable[[Dice, bool], Problem]] = {
    "mlp-digits": _mlp_digits,
    "cnn-digits": _cnn_digits,
    "autoencoder-digits": _autoencoder,
    "gru-text": _gru_text,
    "transformer-text": _transformer_text,
    "gru-sequence": _gru_sequence,
    "transformer-sequence": _transformer_sequence,
    "mlp-teacher": _mlp_teacher,
    "mlp-sinusoids": _mlp_sinusoids,
    "linear": lambda dice, noisy: _linear(dice, 1),
    "logistic": lambda dice, noisy: _linear(dice, dice.randint(2, 8)),
}
"""(dice, whether labels may be noisy) to a problem"""


def sample_task(seed: int, config: TaskConfig | None = None) -> TrainingTask:
    """Return the task of this seed; torch's and Python's own generators are left alone."""
    config = config or TaskConfig()
    dice = Dice(seed)
    names = config.families or tuple(FAMILIES)
    name = dice.choice(names)
    horizon = round(dice.log_uniform(config.min_steps, config.max_steps))
    problem = FAMILIES[name](dice, config.augment)
    net = seeded(problem.make, dice.getrandbits(32))
    start = dice.maybe(0.3, 0.5, 2, 1)
    factor = dice.maybe(0.3 * config.augment, 0.1, 10, 1)
    scales = _scales(dice, len(list(net.parameters()))) if dice.random() < 0.25 * config.augment else []
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.mul_(start)
        for p, scale in zip(net.parameters(), scales, strict=False):
            p.div_(scale)
    score = TaskScorer(net, problem.losses, factor, scales)
    return _task(name, score, problem, horizon, (seed, config.valid_batches, config.valid_size))


def _scales(dice: Dice, number: int) -> list[float]:
    """One a tensor, in 1/4 to 4, half of them 1."""
    return [dice.maybe(0.5, 0.25, 4, 1) for _ in range(number)]


def _task(name: str, score: TaskScorer, problem: Problem, horizon: int, valid: tuple[int, int, int]) -> TrainingTask:
    """``valid``: the task's seed, the number of held-out batches and their size."""
    seed, n_valid, valid_size = valid

    def cut(n: int, size: int, generator: Generator, held_out: bool) -> list[Piece]:
        inputs, targets = problem.draw(n * size, generator, held_out)
        return list(zip(inputs.split(size), targets.split(size), strict=True))

    def pieces(n: int, seed: int) -> list[Piece]:
        return cut(n, problem.batch, generator_of(seed), False)

    valid_pieces = cut(n_valid, valid_size, generator_of(VALID_SEED, seed), True)
    return TrainingTask(name, score.net, score, pieces, valid_pieces, horizon)


def _language(make: Callable[[int], nn.Module], corpus: SplitText, batch: int) -> Problem:
    """Windows of 32 tokens, ``batch`` of them at a time."""
    return Problem(lambda: make(corpus.vocabulary), last_cross_entropy, exercises.text_windows(corpus, 32), batch)


def _lstm_text() -> Problem:
    return _language(lambda vocabulary: nets.LSTMLanguageModel(vocabulary, width=96), exercises.source_code(), 16)


def _llama_words() -> Problem:
    return _language(lambda vocabulary: nets.Llama(vocabulary, width=64), exercises.docstrings(), 8)


def _mixer_letters() -> Problem:
    draw = exercises.glyph_classes(exercises.LETTERS, 16, GlyphNoise(pixels=0.7))
    return Problem(nets.Mixer, cross_entropy, draw, 32)


def _held_out(name: str, problem: Callable[[], Problem]) -> Callable[[int], TrainingTask]:
    def build(seed: int) -> TrainingTask:
        made = problem()
        net = seeded(made.make, seed)
        return _task(name, TaskScorer(net, made.losses), made, 1000, (seed, 16, 64))

    return build


HELD_OUT: dict[str, Callable[[int], TrainingTask]] = {
    "lstm-text": _held_out("lstm-text", _lstm_text),
    "mixer-letters": _held_out("mixer-letters", _mixer_letters),
    "llama-words": _held_out("llama-words", _llama_words),
}
"""name to the task of a seed, which decides the network's start and the held-out batches"""
