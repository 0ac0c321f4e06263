"""``dynlm read FILE...``: a user's own text, read by a model that learns while it reads, beside one that does not.

Both readers score the same tokens, each strictly before the update that sees it. Memory stays flat on streams: a
token's text and losses are kept for the page of ``--html`` only.
"""

from __future__ import annotations

import math
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import torch
import tyro
from tqdm import tqdm

import dynlm
from dynlm.cli.kit import Kit, load_kit
from dynlm.cli.memory import load_memory, save_memory
from dynlm.cli.pair import Pair, Stopped, Totals, perplexity
from dynlm.cli.terminal import Color, Screen
from dynlm.data.texts import Text, read_texts
from dynlm.runs import Json
from dynlm.types import InputError


@dataclass(frozen=True)
class ReadSettings:
    """Read texts with a language model that learns while it reads, and see token by token what that gains."""

    files: tyro.conf.Positional[tuple[str, ...]] = ()
    """.txt, .md, .html, .jsonl (an article a line under "text"), or - for standard input"""
    run: str = ""
    """run directory whose model, tokenizer, prior and rules to read with; without it, those that ship with dynlm"""
    model: str = ""
    """read with this causal language model of transformers instead (a folder, or a hub name in the local cache), its
    prior measured now and its rule untuned; a run with tuned rules gains more: `dynlm train --model.pretrained`, then
    `dynlm tune`"""
    rule: str = ""
    """rule of the run; without it gated, or else rms. With --model: rms, sgd, adam or static"""
    lr: float = 0.0
    """with --model: learning rate of the rule; 0 is where tuning starts (rms 0.002, sgd 1, adam 0.001)"""
    lora_rank: int = 0
    """with --model: adapt low-rank weights of this rank beside the model's own; 0 adapts the model's own"""
    carry: Literal["cache", "overlap", "none"] = "cache"
    """with --model: what it sees of the text before a segment, as context.carry of a run; overlap sees it under the
    present weights, and is slower"""
    prior_text: tuple[str, ...] = ()
    """with --model: texts that the usual size of the gradient is measured on; without any, documentation that Python
    carries"""
    spacing: Literal["auto", "none", "wikitext"] = "auto"
    """wikitext: put ordinary text into the spacing of WikiText ("word , word .") before it is read, which the shipped
    model knows; what is shown and counted stays the text; auto: where the model needs it and the text has it not"""
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


@dataclass
class Record:
    """What the page needs of every token."""

    texts: list[str] = field(default_factory=list)
    static: array[float] = field(default_factory=lambda: array("f"))
    adapted: array[float] = field(default_factory=lambda: array("f"))
    articles: list[tuple[str, int]] = field(default_factory=list)
    """(title, number of its first token)"""


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
    kit = _kit(settings)
    pair, totals, record = Pair(kit, settings.resets, settings.spacing), Totals(), Record() if settings.html else None
    if settings.load_memory:
        position = load_memory(Path(settings.load_memory), pair.adapted, kit.fingerprints())
        pair.start, pair.static_hidden = position
        pair.begin()
    screen, stopped = Screen(sys.stdout, settings.color), False
    with pair.static, pair.adapted:
        try:
            _read_all(pair, texts, screen, (settings, totals, record))
        except Stopped:
            stopped = True
        finally:
            if totals.tokens:
                _print_totals(screen, kit, totals)
        if settings.save_memory and totals.tokens:
            save_memory(Path(settings.save_memory), pair.static, pair.adapted, kit.fingerprints())
            size = Path(settings.save_memory).stat().st_size / 1e6
            print(f"memory: {settings.save_memory} ({size:.1f} MB)", file=sys.stderr)
    if totals.gain < 0:
        print(f"dynlm: note: learning lost here: {_advice(settings, kit)}", file=sys.stderr)
    if record and record.texts:
        _write_page(Path(settings.html), record, (kit, settings, totals))
    if stopped:
        print(f"dynlm: interrupted after {totals.tokens:,} tokens", file=sys.stderr)
        sys.exit(130)
    return totals


def _advice(settings: ReadSettings, kit: Kit) -> str:
    if settings.model:
        return f"lower --lr ({kit.rule.settings()['lr']:g} now), or tune the rule in a run"
    if kit.rule.name != "rms":
        return "--rule rms pulls back to the trained weights, which long streams need"
    return "shorter articles, or --reset article, start anew more often"


def _kit(settings: ReadSettings) -> Kit:
    if settings.model:
        from dynlm.cli.bare import load_bare  # transformers, which takes seconds

        if settings.run:
            raise InputError(f"--model {settings.model} and --run {settings.run}: give one of them")
        return load_bare(settings)
    for name in ("lr", "lora_rank", "prior_text"):
        if getattr(settings, name):
            raise InputError(f"--{name.replace('_', '-')} is for --model: a run's own is in its settings and rules")
    return load_kit(settings.run, settings.rule, settings.resets)


def _read_all(
    pair: Pair, texts: Iterator[Text], screen: Screen, what: tuple[ReadSettings, Totals, Record | None]
) -> None:
    settings, totals, record = what
    shown = not settings.quiet
    several = len(settings.files) > 1 or settings.files[0].endswith(".jsonl")
    if shown:
        screen.legend()
    hidden = screen.terminal and shown
    with pair.stop, tqdm(desc="read", unit="token", unit_scale=True, disable=hidden, file=sys.stderr) as bar:
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
            f"{name:>8}  {nats / totals.tokens:.4f} nats/token  word perplexity {_short(totals.perplexity(nats))}"
            f"  token perplexity {_short(perplexity(nats, totals.tokens))}"
        )
    before, after = totals.perplexity(totals.static), totals.perplexity(totals.adapted)
    change = f": word perplexity {after / before - 1:+.1%}" if math.isfinite(before) and math.isfinite(after) else ""
    screen.line(f"{'gain':>8} {totals.gain:+.4f} nats/token{change}")


def _short(value: float) -> str:
    return f"{value:,.2f}" if value < 1e9 else f"{value:.2e}"


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
