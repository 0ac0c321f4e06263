"""``dynlm read FILE...``: a user's own text, read by a model that learns while it reads, beside one that does not.

Both readers score the same tokens, each strictly before the update that sees it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Annotated, BinaryIO, Literal

import tyro

from dynlm.cli.stop import Stop, Stopped
from dynlm.cli.terminal import Color, Screen, Theme, noted, tell, usage_errors
from dynlm.data.texts import STDIN, Text, read_texts
from dynlm.progress import Bar
from dynlm.session.reader import Reader
from dynlm.session.reading import Reading
from dynlm.session.session import load_session
from dynlm.session.targets import Target, Targets, find_targets
from dynlm.session.totals import Totals, word_lines
from dynlm.settings import WIDE, Bound, NotNegative, Settings
from dynlm.threads import choose_threads
from dynlm.types import InputError

TABLE_ROWS = 8
SCHEMA = 1
"""of the JSON object"""


@dataclass(frozen=True)
class ReadSettings(Settings):
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
    """rule of the run, or one with its cache or mixture (gated+cache+mix); without it gated, in a stream rms. With
    --model: gated (the learned rule that ships), rms, sgd, adam or static"""
    lr: NotNegative = 0.0
    """with --model: learning rate of the rule; 0: a cautious one, from the size of the model's gradient"""
    lora_rank: Annotated[int, Bound(0, WIDE)] = 0
    """with --model: adapt low-rank weights of this rank beside the model's own; 0 adapts the model's own"""
    carry: Literal["cache", "overlap", "none"] = "cache"
    """with --model: what it sees of the text before a segment, as context.carry of a run; overlap sees it under the
    present weights, and is slower"""
    prior_text: tuple[str, ...] = ()
    """with --model: texts that the usual size of the gradient is measured on; without any, documentation that Python
    carries"""
    spacing: Literal["auto", "none", "wikitext"] = "auto"
    """wikitext: put ordinary text into the spacing of WikiText ("word , word .") before it is read, which the model
    wikitext2 knows; what is shown and counted stays the text; auto: where the model needs it and the text has it not"""
    reset: Literal["auto", "article", "never"] = "auto"
    """article: weights start anew at each article; never: all texts are one stream; auto: article, or never with a
    memory"""
    color: Annotated[Color, tyro.conf.arg(aliases=["--colour"])] = "auto"
    """blue is better than static, red worse; auto: on a terminal, unless NO_COLOR is set"""
    theme: Theme = "auto"
    """background of the terminal, on which the largest gains stand out; auto: as COLORFGBG says, dark without it"""
    html: str = ""
    """write one self-contained page with every token to this file"""
    save_memory: str = ""
    """write what reading changed in the model to this file, also where reading ends early: by an error (exit code 2),
    Ctrl-C (130), SIGTERM (143) or a closed terminal (129)"""
    load_memory: str = ""
    """go on from such a file"""
    overwrite: bool = False
    """let --html and --save-memory replace a file that is no page, or no memory, of dynlm"""
    threads: Annotated[int, Bound(0, 1024)] = 0
    """threads to compute with; 0: one for small models, else chosen by a measurement of some 50 ms"""
    json: bool = False
    """print one JSON object to standard output and everything else to standard error: totals, settings, fingerprints,
    articles, words that came again, and the text, static and adapted loss (nats) of every token; like --html, this
    keeps all tokens in memory until the end"""
    quiet: bool = False
    """totals only"""

    @property
    def resets(self) -> Literal["article", "never"]:
        if self.reset == "auto":
            return "never" if self.save_memory or self.load_memory else "article"
        return self.reset


def main(arguments: Sequence[str], stdin: BinaryIO | None = None) -> None:
    """The command, from its arguments."""
    with usage_errors():
        settings = tyro.cli(ReadSettings, prog="dynlm read", args=list(arguments))
    try:
        read(settings, stdin)
    except BrokenPipeError:  # whoever read the output has seen enough, as in `dynlm read FILE | head`
        pass
    finally:
        _let_go_of_output()


def _let_go_of_output() -> None:
    """Standard output that cannot be written to is given up, so that the interpreter's end is quiet about it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@noted(tell)
def read(settings: ReadSettings, stdin: BinaryIO | None = None) -> Totals:
    """Read all texts, show them, and write what was asked for; after an error and a signal too, of what was read.

    Raises:
        InputError: bad texts, files, runs, memories, or a place that cannot be written to.
    """
    texts = read_texts(settings.files, stdin)  # names are looked at before anything is loaded
    inputs = [name for name in (*settings.files, *settings.prior_text) if name != STDIN]
    targets = find_targets(settings.html, settings.save_memory, inputs, settings.load_memory, settings.overwrite)
    reader = _reader(settings)
    threads = choose_threads(settings.threads, sum(p.numel() for p in reader.session.model.parameters()))
    if not settings.quiet:
        print(f"threads: {threads}", file=sys.stderr)
    if settings.save_memory:
        reader.require_memory()
    if settings.load_memory:
        reader.load_memory(settings.load_memory)
    wants_tokens = bool(settings.html or settings.json)
    reading = reader.reading(tokens=wants_tokens, words=wants_tokens or not settings.quiet)
    screen = Screen(sys.stderr if settings.json else sys.stdout, settings.color, settings.theme)
    failures: list[Exception] = []
    stopped = False
    with reader, Stop() as stop:
        try:
            _read_all(reader, reading, texts, screen, settings, stop)
        except Stopped:
            stopped = True
        except Exception as error:  # nothing that was read may be lost, whatever went wrong
            failures.append(error)
        reading.end()
        if reading.totals.tokens:
            failures += Outcome(settings, reader, reading, screen).write(targets, str(next(iter(failures), "")), stop)
    _raise_first(failures)
    if stopped or stop.asked:
        tell(f"interrupted after {reading.totals.tokens:,} tokens")
        sys.exit(stop.exit_code)
    return reading.totals


class Outcome:
    """What is shown and written at the end. What fails does not keep the rest from being written."""

    def __init__(self, settings: ReadSettings, reader: Reader, reading: Reading, screen: Screen) -> None:
        self.settings, self.reader, self.reading, self.screen = settings, reader, reading, screen

    def write(self, targets: Targets, error: str, stop: Stop) -> list[Exception]:
        """Write everything that was asked for; returns what went wrong."""
        stopped_by = error or (signal.Signals(stop.exit_code - 128).name if stop.asked else "")
        actions: list[Callable[[], None]] = [self.print_totals]
        if memory := targets.memory:
            actions.insert(0, lambda: self.write_memory(memory))
        if page := targets.page:
            actions.append(lambda: self.write_page(page))
        if self.settings.json:
            actions.append(lambda: self.print_json(stopped_by))
        failures: list[Exception] = []
        for action in actions:
            try:
                action()
            except Exception as failure:  # told at the end
                failures.append(failure)
        return failures

    def write_memory(self, target: Target) -> None:
        """What reading changed in the model.

        Raises:
            InputError: weights that the last update left not finite.
        """
        with target.writing() as path:
            self.reader.save_memory(path)
        tell(f"memory: {target.name} ({target.megabytes()})")

    def write_page(self, target: Target) -> None:
        """Every token, on one page."""
        with target.writing() as path:
            self.reading.to_html(path)
        tell(f"page: {target.name} ({target.megabytes()})")

    def print_json(self, stopped_by: str) -> None:
        """One object on standard output."""
        told = {"schema": SCHEMA, "stopped_by": stopped_by or None, "settings": asdict(self.settings)}
        json.dump(told | self.reading.to_dict(), sys.stdout, allow_nan=False)
        sys.stdout.write("\n")
        sys.stdout.flush()

    def print_totals(self) -> None:
        """Totals, the words that came again, and warnings."""
        reading, rule = self.reading, self.reading.method
        lines = reading.totals.told(rule)
        if reading.words and not self.settings.quiet:
            table = word_lines(reading.words.rows()[:TABLE_ROWS], reading.words.mean(), rule)
            lines += ["", *table] if table else []
            if table and reading.words.limit:
                lines.append(f"({reading.words.limit})")
        for line in ("", *lines):
            self.screen.line(line)
        if reading.note:
            tell(f"note: {reading.note}")
        if reading.gain < 0:
            tell(f"note: learning lost here: {self._advice()}")

    def _advice(self) -> str:
        rule = self.reader.rule
        if self.settings.model:
            return f"lower --lr ({rule.settings()['lr']:g} now), or tune the rule in a run"
        if rule.name != "rms":
            return "--rule rms pulls back to the trained weights, which long streams need"
        return "shorter articles, or --reset article, start anew more often"


def _raise_first(failures: Sequence[Exception]) -> None:
    """Raise the first failure, which the command line tells, and tell the others."""
    order = sorted(failures, key=lambda failure: isinstance(failure, BrokenPipeError))
    for failure in order[1:]:
        if not isinstance(failure, BrokenPipeError) and str(failure) != str(order[0]):
            tell(str(failure))
    if order:
        raise order[0]


def _reader(settings: ReadSettings) -> Reader:
    if not settings.model:
        for name in ("lr", "lora_rank", "prior_text"):
            if getattr(settings, name):
                raise InputError(f"--{name.replace('_', '-')} is for --model: a run's own is in its settings and rules")
        return Reader(load_session(settings.run, settings.resets, light=True), settings.rule, spacing=settings.spacing)
    if settings.run:
        raise InputError(f"--model {settings.model} and --run {settings.run}: give one of them")
    return Reader.of_model(
        settings.model,
        settings.rule,
        lr=settings.lr,
        spacing=settings.spacing,
        reset=settings.resets,
        carry=settings.carry,
        lora_rank=settings.lora_rank,
        prior_text=settings.prior_text,
    )


def _read_all(
    reader: Reader, reading: Reading, texts: Iterator[Text], screen: Screen, settings: ReadSettings, stop: Stop
) -> None:
    shown = not settings.quiet
    several = len(settings.files) > 1 or settings.files[0].endswith(".jsonl")
    if shown:
        screen.legend()
    hidden = screen.terminal and shown
    with nullcontext(None) if hidden else Bar(0, "read", "token", unit_scale=True) as bar:
        for text in texts:
            if several and shown:
                screen.line(f"── {text.title}")
            text.chunks = stop.waiting(text.chunks)
            for step in reader.steps(text, reading):
                if shown:
                    screen.tokens(step.texts, (step.static - step.losses).tolist())
                if bar is not None:
                    bar.update(len(step.texts))
                step.update()
                stop.check()
            for note in text.notes:
                tell(f"note: {note}")
