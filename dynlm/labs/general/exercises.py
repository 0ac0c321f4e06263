"""What small networks learn in training tasks: endless random batches of images, text, sequences and functions.

A :data:`Draw` gives as many examples as asked for, from its generator alone. Classes, text and hidden functions are
fixed when it is made. Glyphs and text have a part that is only drawn from to validate; noise of labels and targets is
left out there.
"""

from __future__ import annotations

import ast
import math
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from dynlm.data.stdlib import load_articles
from dynlm.labs.fewshot.characters import draw_glyphs, stack_glyphs, vary_glyphs
from dynlm.types import InputError, Piece

Draw = Callable[[int, Generator, bool], Piece]
"""(examples, generator, held out) to inputs and targets, the first axis of both the examples"""

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INK = 0.2, 0.35
"""mean and standard deviation of glyphs, to standardise with"""
HELD_OUT_SHARE = 0.15
"""of the instances of a glyph"""


def generator_of(*seeds: int) -> Generator:
    """Return a generator of its own for each combination of seeds."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 0x9E3779B97F4A7C15 + seed + 1) % 2**63
    return Generator().manual_seed(mixed ^ mixed >> 32)  # torch takes the lower half


@cache
def _drawn() -> dict[int, list[Tensor]]:
    return draw_glyphs()


@cache
def glyph_images(symbols: str, side: int, variants: int = 12) -> list[Tensor]:
    """Of each symbol (instances, 1, side, side), values 0–1: ``variants`` of each font's glyph, in random order."""
    generator = generator_of(side)
    images = []
    for symbol in symbols:
        instances = vary_glyphs(stack_glyphs(_drawn()[ord(symbol)]).repeat_interleave(variants, 0), side, generator)
        images.append(instances[torch.randperm(len(instances), generator=generator), None])
    return images


class GlyphNoise(NamedTuple):
    """What is wrong with the images and labels that a task shows."""

    pixels: float = 0.3
    """standard deviation of noise on standardised pixels"""
    labels: float = 0.0
    """share of labels that are drawn at random"""


def glyph_classes(symbols: str, side: int, noise: GlyphNoise, reconstruct: bool = False) -> Draw:
    """Which of ``symbols`` is it: (n, 1, side, side) to (n,); or ``reconstruct``: to the clean pixels (n, side²)."""
    groups = glyph_images(symbols, side)
    parts = []
    for held_out in (False, True):
        cuts = [round(HELD_OUT_SHARE * len(group)) for group in groups]
        chosen = [group[:cut] if held_out else group[cut:] for group, cut in zip(groups, cuts, strict=True)]
        labels = torch.cat([torch.full((len(group),), i) for i, group in enumerate(chosen)])
        parts.append(((torch.cat(chosen) - INK[0]) / INK[1], labels))

    def draw(n: int, generator: Generator, held_out: bool) -> Piece:
        images, labels = parts[held_out]
        index = torch.randint(len(images), (n,), generator=generator)
        clean = images[index]
        inputs = clean + noise.pixels * torch.randn(clean.shape, generator=generator)
        if reconstruct:
            return inputs, clean.flatten(1)
        return inputs, confuse(labels[index], len(symbols), 0.0 if held_out else noise.labels, generator)

    return draw


def confuse(labels: Tensor, n_classes: int, share: float, generator: Generator) -> Tensor:
    """Return a ``share`` of labels drawn anew; the generator advances by the same amount whatever the share is."""
    others = torch.randint(n_classes, labels.shape, generator=generator)
    wrong = torch.rand(labels.shape, generator=generator) < share
    return torch.where(wrong, others, labels)


class SplitText(NamedTuple):
    """Text as ids, in a part to train and one to validate with."""

    train_T: Tensor
    valid_T: Tensor
    vocabulary: int


@cache
def documentation(symbols: int = 64) -> SplitText:
    """Return the topics of Python's language reference as the most frequent characters, and one id for all others.

    Every tenth topic is held out. The modules' documentation and source are not in it: see the two corpora below.
    """
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    try:
        tree = ast.parse(path.read_bytes())
    except OSError:
        raise InputError(f"no documentation at {path}: this Python ships without it; take another") from None
    values = [node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    topics = next(ast.literal_eval(value) for value in values if isinstance(value, ast.Dict))
    texts = [text for _, text in sorted(topics.items())]
    return _encode([t for i, t in enumerate(texts) if i % 10], texts[::10], list, symbols)


# pure Python in every supported version, none of them a part of the two corpora of documentation
SOURCES: tuple[str, ...] = (
    "argparse",
    "bdb",
    "calendar",
    "cmd",
    "codeop",
    "configparser",
    "copy",
    "csv",
    "dataclasses",
    "difflib",
    "dis",
)
SOURCES += (
    "doctest",
    "enum",
    "fileinput",
    "fractions",
    "ftplib",
    "gettext",
    "heapq",
    "imaplib",
    "inspect",
    "ipaddress",
)
SOURCES += (
    "locale",
    "mailbox",
    "mimetypes",
    "optparse",
    "pdb",
    "pickle",
    "pickletools",
    "plistlib",
    "poplib",
    "pprint",
)
SOURCES += (
    "profile",
    "pydoc",
    "queue",
    "random",
    "sched",
    "selectors",
    "shelve",
    "shlex",
    "shutil",
    "smtplib",
    "socket",
)
SOURCES += ("socketserver", "ssl", "statistics", "string", "subprocess", "tabnanny", "tarfile", "tempfile", "textwrap")
SOURCES += ("threading", "timeit", "tokenize", "trace", "traceback", "types", "typing", "uuid", "warnings", "weakref")
SOURCES += ("webbrowser", "zipfile")
PACKAGES: tuple[str, ...] = ("asyncio", "concurrent", "ctypes", "email", "html", "http", "importlib", "json", "logging")
PACKAGES += ("multiprocessing", "unittest", "urllib", "xml")


@cache
def source_code(symbols: int = 96) -> SplitText:
    """Python's own modules as characters; every eighth module is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for name in sorted(SOURCES) if (path := root / f"{name}.py").is_file()]
    texts = [path.read_text(encoding="utf-8") for path in files]
    if len(texts) < 8:
        raise InputError(f"{root} has {len(texts)} of the modules to learn from: this Python ships without its sources")
    return _encode([t for i, t in enumerate(texts) if i % 8], texts[::8], list, symbols)


@cache
def docstrings(symbols: int = 512) -> SplitText:
    """Docstrings of Python's packages as frequent words, others spelled in characters; every eighth is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = [a.text for name in PACKAGES if (root / name).is_dir() for a in load_articles(root / name)]
    train = [t for i, t in enumerate(texts) if i % 8]
    letters = {chr(code) for code in range(32, 127)} | {"\n"}
    counts = Counter(word for text in train for word in _words(text) if len(word) > 1)
    known = letters | {word for word, _ in counts.most_common(symbols - len(letters) - 1)}

    def split(text: str) -> list[str]:
        return [token for word in _words(text) for token in ([word] if word in known else word)]

    return _encode(train, texts[::8], split, symbols)


def _words(text: str) -> list[str]:
    return re.findall(r" ?\w+| +|\W", text)


def _encode(
    train: Sequence[str], valid: Sequence[str], split: Callable[[str], list[str]], vocabulary: int
) -> SplitText:
    """Return the ``vocabulary`` − 1 most frequent tokens of the training text, and id 0 for all others."""
    tokens = [[token for text in texts for token in split(text)] for texts in (train, valid)]
    counts = sorted(Counter(tokens[0]).items(), key=lambda item: (-item[1], item[0]))
    ids = {token: i for i, (token, _) in enumerate(counts[: vocabulary - 1], 1)}
    train_T, valid_T = (torch.tensor([ids.get(token, 0) for token in part]) for part in tokens)
    return SplitText(train_T, valid_T, vocabulary)


def text_windows(corpus: SplitText, length: int) -> Draw:
    """Next-token prediction anywhere in the text: (n, length) to (n, length)."""

    def draw(n: int, generator: Generator, held_out: bool) -> Piece:
        ids_T = corpus.valid_T if held_out else corpus.train_T
        starts = torch.randint(len(ids_T) - length, (n, 1), generator=generator)
        windows = ids_T[starts + torch.arange(length + 1)]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    return draw


Transduction = Literal["copy", "reverse", "sort", "add"]


def transductions(kind: Transduction, symbols: int, length: int) -> Draw:
    """Return a random sequence, a separator (id ``symbols``), then its image: targets are the last ``length`` tokens.

    ``add``: two sequences, then their sum a place modulo ``symbols``. Inputs (n, 2 · length) or (n, 3 · length).
    """

    def draw(n: int, generator: Generator, held_out: bool) -> Piece:
        source = torch.randint(symbols, (n, 2 if kind == "add" else 1, length), generator=generator)
        image = {
            "copy": lambda: source[:, 0],
            "reverse": lambda: source[:, 0].flip(1),
            "sort": lambda: source[:, 0].sort(1).values,
            "add": lambda: source.sum(1) % symbols,
        }[kind]()
        separator = torch.full((n, 1), symbols)
        return torch.cat([source.flatten(1), separator, image[:, :-1]], 1), image

    return draw


def teacher(sizes: Sequence[int], noise: float, generator: Generator) -> Draw:
    """Regression of a random tanh network with inputs N(0, 1) and outputs of about unit variance."""
    layers = [1.5 * torch.randn(i, o, generator=generator) / math.sqrt(i) for i, o in pairwise(sizes)]
    shifts = [0.5 * torch.randn(o, generator=generator) for o in sizes[1:]]

    def answer(x: Tensor) -> Tensor:
        for weight, shift in zip(layers[:-1], shifts, strict=False):
            x = torch.tanh(x @ weight + shift)
        return x @ layers[-1]

    outputs = answer(torch.randn(1000, sizes[0], generator=generator))
    centre, spread = outputs.mean(0), outputs.std(0).clamp_min(1e-3)

    def draw(n: int, generator: Generator, held_out: bool) -> Piece:
        x = torch.randn(n, sizes[0], generator=generator)
        error = torch.randn(n, sizes[-1], generator=generator) * (0.0 if held_out else noise)
        return x, (answer(x) - centre) / spread + error

    return draw


def sinusoids(waves: int, inputs: int, noise: float, generator: Generator) -> Draw:
    """Regression of a sum of plane waves of 0.25–2 periods on [−1, 1]^inputs, unit variance: (n, inputs) to (n, 1)."""
    direction = torch.nn.functional.normalize(torch.randn(inputs, waves, generator=generator), dim=0)
    frequency = math.pi * 0.25 * 8 ** torch.rand(waves, generator=generator)
    phase = 2 * math.pi * torch.rand(waves, generator=generator)

    def draw(n: int, generator: Generator, held_out: bool) -> Piece:
        x = 2 * torch.rand(n, inputs, generator=generator) - 1
        y = torch.sin(x @ (direction * frequency) + phase).sum(1, keepdim=True) * math.sqrt(2 / waves)
        return x, y + torch.randn(n, 1, generator=generator) * (0.0 if held_out else noise)

    return draw


class Spectrum(NamedTuple):
    """Inputs of a linear problem: standard deviations fall from 1 to 1/condition along random directions."""

    inputs: int
    condition: float


def linear(spectrum: Spectrum, classes: int, noise: float, generator: Generator) -> Draw:
    """Inputs (n, inputs); targets a linear function with noise (n, 1), or with ``classes`` > 1 the largest of so many.

    Noise is relative to a function of unit variance; each direction of the inputs counts the same in it.
    """
    d = spectrum.inputs
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    scales = spectrum.condition ** -torch.linspace(0, 1, d)
    weights = torch.randn(d, classes, generator=generator) / math.sqrt(d)

    def draw(n: int, generator: Generator, held_out: bool) -> Piece:
        z = torch.randn(n, d, generator=generator)
        answer = z @ weights
        if classes > 1 or not held_out:  # of classes, noise is part of what is to be learned: it bounds the margin
            answer = answer + noise * torch.randn(n, classes, generator=generator)
        return (z * scales) @ rotation.t(), answer.argmax(1) if classes > 1 else answer

    return draw
