"""``dynlm read FILE...``: a user's own text, read by a model that learns while it reads, beside one that does not.

Both readers score the same tokens, each strictly before the update that sees it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import tyro

from dynlm.cli.kit import Kit, load_kit
from dynlm.cli.memory import load_memory
from dynlm.cli.outcome import Outcome
from dynlm.cli.pair import Pair, Stopped
from dynlm.cli.targets import Target, is_memory, is_page, require_apart
from dynlm.cli.terminal import Color, Screen, Theme, tell, usage_errors
from dynlm.cli.totals import Totals, word_lines
from dynlm.data.texts import STDIN, Text, read_texts
from dynlm.progress import Bar
from dynlm.settings import WIDE, Bound, NotNegative, Settings
from dynlm.threads import choose_threads
from dynlm.types import InputError

TABLE_ROWS = 8


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
    """rule of the run; without it gated, or else rms. With --model: rms, sgd, adam or static"""
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
    """wikitext: put ordinary text into the spacing of WikiText ("word , word .") before it is read, which the shipped
    model knows; what is shown and counted stays the text; auto: where the model needs it and the text has it not"""
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


def read(settings: ReadSettings, stdin: BinaryIO | None = None) -> Totals:
    """Read all texts, show them, and write what was asked for; after an error and a signal too, of what was read.

    Raises:
        InputError: bad texts, files, runs, memories, or a place that cannot be written to.
    """
    texts = read_texts(settings.files, stdin)  # names are looked at before anything is loaded
    page, memory = _targets(settings)
    kit = _kit(settings)
    threads = choose_threads(settings.threads, sum(p.numel() for p in kit.model.parameters()))
    if not settings.quiet:
        print(f"threads: {threads}", file=sys.stderr)
    pair, outcome = Pair(kit, settings.resets, settings.spacing), Outcome(settings, kit)
    if settings.load_memory:
        _go_on_from(Path(settings.load_memory), pair)
    screen = Screen(sys.stderr if settings.json else sys.stdout, settings.color, settings.theme)
    failures: list[Exception] = []
    stopped = False
    with pair.static, pair.adapted, pair.stop:
        try:
            _read_all(pair, texts, screen, outcome)
        except Stopped:
            stopped = True
        except Exception as error:  # nothing that was read may be lost, whatever went wrong
            failures.append(error)
        outcome.end()
        if outcome.totals.tokens:
            failures += _write(pair, outcome, screen, (page, memory, str(next(iter(failures), ""))))
    _raise_first(failures)
    if stopped or pair.stop.asked:
        tell(f"interrupted after {outcome.totals.tokens:,} tokens")
        sys.exit(pair.stop.exit_code)
    return outcome.totals


def _targets(settings: ReadSettings) -> tuple[Target | None, Target | None]:
    """(page, memory), tried before hours of reading."""
    inputs = [name for name in (*settings.files, *settings.prior_text) if name != STDIN]
    page = memory = None
    if settings.html:
        page = Target(settings.html, [*inputs, settings.load_memory], is_page, settings.overwrite)
    if settings.save_memory:
        memory = Target(settings.save_memory, inputs, is_memory, settings.overwrite)
    require_apart([target for target in (page, memory) if target])
    return page, memory


def _go_on_from(path: Path, pair: Pair) -> None:
    memory = load_memory(path, pair.adapted, pair.kit.memory_of())
    pair.start, pair.static_hidden = memory.position, memory.static_hidden
    pair.begin()
    if memory.segment not in (None, pair.size):
        tell(f"note: {path} was made with updates every {memory.segment} tokens; now they come every {pair.size}")


def _write(
    pair: Pair, outcome: Outcome, screen: Screen, what: tuple[Target | None, Target | None, str]
) -> list[Exception]:
    """Everything that was asked for. What fails does not keep the rest from being written."""
    page, memory, error = what
    failures: list[Exception] = []

    def attempt(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as failure:  # told at the end
            failures.append(failure)

    if memory:
        attempt(lambda: outcome.write_memory(memory, pair))
    attempt(lambda: _print_totals(screen, outcome))
    if page:
        attempt(lambda: outcome.write_page(page))
    if outcome.settings.json:
        stopped_by = error or (signal.Signals(pair.stop.exit_code - 128).name if pair.stop.asked else "")
        attempt(lambda: outcome.print_json(stopped_by))
    return failures


def _raise_first(failures: Sequence[Exception]) -> None:
    """Raise the first failure, which the command line tells, and tell the others."""
    order = sorted(failures, key=lambda failure: isinstance(failure, BrokenPipeError))
    for failure in order[1:]:
        if not isinstance(failure, BrokenPipeError) and str(failure) != str(order[0]):
            tell(str(failure))
    if order:
        raise order[0]


def _print_totals(screen: Screen, outcome: Outcome) -> None:
    totals, kit = outcome.totals, outcome.kit
    lines = totals.told(kit.rule.name)
    if outcome.words and not outcome.settings.quiet:
        table = word_lines(outcome.words.rows()[:TABLE_ROWS], outcome.words.mean(), kit.rule.name)
        lines += ["", *table] if table else []
        if table and outcome.words.limit:
            lines.append(f"({outcome.words.limit})")
    for line in ("", *lines):
        screen.line(line)
    if note := outcome.note():
        tell(f"note: {note}")
    if totals.gain < 0:
        tell(f"note: learning lost here: {_advice(outcome.settings, kit)}")


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


def _read_all(pair: Pair, texts: Iterator[Text], screen: Screen, outcome: Outcome) -> None:
    settings = outcome.settings
    shown = not settings.quiet
    several = len(settings.files) > 1 or settings.files[0].endswith(".jsonl")
    if shown:
        screen.legend()
    hidden = screen.terminal and shown
    with nullcontext(None) if hidden else Bar(0, "read", "token", unit_scale=True) as bar:
        for text in texts:
            if several and shown:
                screen.line(f"── {text.title}")
            outcome.begin(text.title)
            for scored in pair.read(text, outcome.totals):
                outcome.add(scored)
                if shown:
                    screen.tokens(scored.texts, [a - b for a, b in zip(scored.static, scored.adapted, strict=True)])
                if bar is not None:
                    bar.update(len(scored.texts))
            for note in text.notes:
                tell(f"note: {note}")
