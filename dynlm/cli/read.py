"""``dynlm read FILE...``: a user's own text, read by a model that learns while it reads, beside one that does not.

Both readers score the same tokens, each strictly before the update that sees it. Memory stays flat on streams: a
token's text and losses are kept for the page of ``--html`` only.
"""

from __future__ import annotations

import math
import os
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NamedTuple

import torch
import tyro
from tqdm import tqdm

import dynlm
from dynlm.cli.kit import Kit, load_kit
from dynlm.cli.memory import copied, load_memory, save_memory
from dynlm.cli.terminal import Color, Screen
from dynlm.data.texts import Text, encode_chunk, read_texts, surfaces
from dynlm.runs import Json
from dynlm.types import InputError


@dataclass(frozen=True)
class ReadSettings:
    """Read texts with a language model that learns while it reads, and see token by token what that gains."""

    files: tyro.conf.Positional[tuple[str, ...]] = ()
    """.txt, .md, .html, .jsonl (an article a line under "text"), or - for standard input"""
    run: str = ""
    """run directory whose model, tokenizer, prior and rules to read with; without it, those that ship with dynlm"""
    rule: str = ""
    """rule of the run; without it gated, or else rms"""
    reset: Literal["auto", "article", "never"] = "auto"
    """article: weights start anew at each article; never: all texts are one stream; auto: article, or never with a
    memory"""
    color: Annotated[Color, tyro.conf.arg(aliases=["--colour"])] = "auto"
    """blue is better than static, red worse; auto: on a terminal, unless NO_COLOR is set"""
    html: str = ""
    """write one self-contained page with every token to this file"""
    save_memory: str = ""
    """write what reading changed in the model to this file"""
    load_memory: str = ""
    """go on from such a file"""
    quiet: bool = False
    """totals only"""

    @property
    def resets(self) -> Literal["article", "never"]:
        if self.reset == "auto":
            return "never" if self.save_memory or self.load_memory else "article"
        return self.reset


class Scored(NamedTuple):
    """Tokens of one segment: their stretches of the text and their losses in nats under both readers."""

    texts: list[str]
    static: list[float]
    adapted: list[float]


@dataclass
class Totals:
    """Sums over all that was read. ``words`` counts an end-of-line a line, as everywhere in dynlm."""

    articles: int = 0
    tokens: int = 0
    words: int = 0
    bytes: int = 0
    static: float = 0.0
    """nats"""
    adapted: float = 0.0
    """nats"""
    seconds: float = 0.0

    @property
    def gain(self) -> float:
        """Nats a token."""
        return (self.static - self.adapted) / max(1, self.tokens)

    def perplexity(self, nats: float) -> float:
        """By word; infinite where a text has next to no words."""
        mean = nats / max(1, self.words)
        return math.exp(mean) if mean < 700 else math.inf


@dataclass
class Record:
    """What the page needs of every token."""

    texts: list[str] = field(default_factory=list)
    static: array[float] = field(default_factory=lambda: array("f"))
    adapted: array[float] = field(default_factory=lambda: array("f"))
    articles: list[tuple[str, int]] = field(default_factory=list)
    """(title, number of its first token)"""


class Pair:
    """The two readers over one stream of tokens, cut into segments as :class:`dynlm.adapt.Reader` cuts an article."""

    def __init__(self, kit: Kit, settings: ReadSettings) -> None:
        self.kit, self.resets = kit, settings.resets
        self.static, self.adapted = kit.readers()
        self.size, self.start_id = kit.config.segment, kit.tokenizer.eos_id
        self.start, self.static_hidden = None, None
        if settings.load_memory:
            self.start, self.static_hidden = load_memory(Path(settings.load_memory), self.adapted, kit.fingerprints())
        self._begin()

    def _begin(self) -> None:
        self.static.begin()
        self.static.hidden = self.static_hidden
        if self.start is None:
            self.adapted.begin()
        else:
            self.adapted.resume(copied(self.start))

    def read(self, text: Text, totals: Totals) -> Iterator[Scored]:
        """One text, segment by segment; ``totals`` grows with it."""
        if self.resets == "article" and totals.articles:
            self._begin()
        totals.articles += 1
        ids: list[int] = []
        texts: list[str] = []
        previous, in_word = self.start_id, False
        for chunk in text.chunks:
            new = encode_chunk(self.kit.tokenizer, chunk)
            texts += surfaces(self.kit.tokenizer.pieces(new), chunk)
            ids += new
            totals.bytes += len(chunk.encode())
            totals.words += len(chunk.split()) + chunk.count("\n") - (in_word and not chunk[0].isspace())
            in_word = not chunk[-1].isspace()
            whole = len(ids) - len(ids) % self.size
            for at in range(0, whole, self.size):
                yield self._segment(previous, ids[at : at + self.size], texts[at : at + self.size], totals)
                previous = ids[at + self.size - 1]
            del ids[:whole], texts[:whole]
        if ids:
            yield self._segment(previous, ids, texts, totals)

    def _segment(self, previous: int, ids: list[int], texts: list[str], totals: Totals) -> Scored:
        started = time.perf_counter()
        targets_S = torch.tensor(ids)
        inputs_S = torch.tensor([previous, *ids[:-1]])
        device = self.adapted.parameters[0].device
        pieces = inputs_S.to(device), targets_S.to(device)
        static_S, adapted_S = (r.segment(*pieces).losses_S.double().cpu() for r in (self.static, self.adapted))
        totals.tokens += len(ids)
        totals.static += float(static_S.sum())
        totals.adapted += float(adapted_S.sum())
        totals.seconds += time.perf_counter() - started
        return Scored(texts, static_S.tolist(), adapted_S.tolist())


def main(arguments: Sequence[str], stdin: BinaryIO | None = None) -> None:
    """The command, from its arguments."""
    settings = tyro.cli(ReadSettings, prog="dynlm read", args=list(arguments))
    try:
        read(settings, stdin)
    except BrokenPipeError:  # whoever read the output has seen enough, as in `dynlm read FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read(settings: ReadSettings, stdin: BinaryIO | None = None) -> Totals:
    """Read all texts, show them, and write what was asked for.

    Raises:
        InputError: bad texts, files, runs, memories, or a place that cannot be written to.
    """
    texts = read_texts(settings.files, stdin)  # names are looked at before anything is loaded
    for target in (settings.html, settings.save_memory):
        if target and (Path(target).is_dir() or not Path(target).absolute().parent.is_dir()):
            raise InputError(f"cannot write {target}: give a file in an existing folder")
    kit = load_kit(settings.run, settings.rule, settings.resets)
    pair, totals, record = Pair(kit, settings), Totals(), Record() if settings.html else None
    screen = Screen(sys.stdout, settings.color)
    with pair.static, pair.adapted:
        try:
            _read_all(pair, texts, screen, (settings, totals, record))
        finally:
            if totals.tokens:
                _print_totals(screen, kit, totals)
        if settings.save_memory:
            save_memory(Path(settings.save_memory), pair.static, pair.adapted, kit.fingerprints())
            size = Path(settings.save_memory).stat().st_size / 1e6
            print(f"memory: {settings.save_memory} ({size:.1f} MB)", file=sys.stderr)
    if record:
        _write_page(Path(settings.html), record, (kit, settings, totals))
    return totals


def _read_all(
    pair: Pair, texts: Iterator[Text], screen: Screen, what: tuple[ReadSettings, Totals, Record | None]
) -> None:
    settings, totals, record = what
    shown = not settings.quiet
    several = len(settings.files) > 1 or settings.files[0].endswith(".jsonl")
    if shown:
        screen.legend()
    hidden = screen.terminal and shown
    with tqdm(desc="read", unit="token", unit_scale=True, disable=hidden, file=sys.stderr) as bar:
        for text in texts:
            if several and shown:
                screen.line(f"── {text.title}")
            if record:
                record.articles.append((text.title, len(record.texts)))
            for scored in pair.read(text, totals):
                if shown:
                    screen.tokens(scored.texts, [a - b for a, b in zip(scored.static, scored.adapted, strict=True)])
                if record:
                    record.texts += scored.texts
                    record.static.extend(scored.static)
                    record.adapted.extend(scored.adapted)
                bar.update(len(scored.texts))
            for note in text.notes:
                bar.write(f"dynlm: note: {note}", file=sys.stderr)


def _print_totals(screen: Screen, kit: Kit, totals: Totals) -> None:
    screen.line(
        f"\n{totals.words:,} words, {totals.tokens:,} tokens, {totals.seconds:.1f} s "
        f"({totals.tokens / max(totals.seconds, 1e-9):,.0f} tokens/s)"
    )
    for name, nats in (("static", totals.static), (kit.rule.name, totals.adapted)):
        screen.line(
            f"{name:>8}  {nats / totals.tokens:.4f} nats/token  word perplexity {totals.perplexity(nats):,.2f}"
            f"  token perplexity {math.exp(nats / totals.tokens):,.2f}"
        )
    before, after = totals.perplexity(totals.static), totals.perplexity(totals.adapted)
    change = f": word perplexity {after / before - 1:+.1%}" if math.isfinite(before) and math.isfinite(after) else ""
    screen.line(f"{'gain':>8} {totals.gain:+.4f} nats/token{change}")


def _write_page(path: Path, record: Record, what: tuple[Kit, ReadSettings, Totals]) -> None:
    from dynlm.report.tokenmap import TokenMap, write_token_map  # matplotlib, which takes a second

    kit, settings, totals = what
    numbers: Json = asdict(totals) | {
        "static_word_ppl": totals.perplexity(totals.static),
        "adapted_word_ppl": totals.perplexity(totals.adapted),
    }
    told = {
        "model": kit.source,
        "adapted weights": sum(p.theta0.numel() for p in kit.priors),
        **{f"fingerprint of the {name}": value for name, value in kit.fingerprints().items()},
        "tokens between updates": kit.config.segment,
        "weights reset": "never" if settings.resets == "never" else "at each article",
        "read on from": settings.load_memory or "the trained weights",
        "dynlm": dynlm.__version__,
        "torch": torch.__version__,
    }
    told |= {f"rule: {name}": value for name, value in kit.rule.settings().items()}
    write_token_map(
        path, TokenMap(kit.rule.name, record.articles, record.texts, record.static, record.adapted, numbers, told)
    )
    print(f"page: {path} ({path.stat().st_size / 1e6:.1f} MB)", file=sys.stderr)
