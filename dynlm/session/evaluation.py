"""Several methods over identical tokens, and what is known of them afterwards."""

from __future__ import annotations

import dataclasses
import logging
import math
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

import dynlm
from dynlm import results
from dynlm.data.articles import Corpus
from dynlm.data.tokenizers import Tokenizer, load_tokenizer, lost_share
from dynlm.evaluation.breakdowns import ArticlesRead, break_down
from dynlm.evaluation.cache import CachedReader
from dynlm.evaluation.compare import describe, summarize, write_results
from dynlm.evaluation.metrics import Counts, count
from dynlm.evaluation.mixture import MixedReader
from dynlm.evaluation.stream import Scores, read_and_watch
from dynlm.files import Json, write_text
from dynlm.inner import InnerLoop
from dynlm.lazy import optional
from dynlm.methods import Method
from dynlm.processes import share
from dynlm.progress import Bar
from dynlm.report import tables
from dynlm.runs import Run
from dynlm.session.reading import frame
from dynlm.session.session import Session, model_fingerprint
from dynlm.stamps import fingerprint_files
from dynlm.types import Article, DivergedError, InputError, TokenizedArticle

if TYPE_CHECKING:
    import pandas

    from dynlm.report.pairing import SideBySide

log = logging.getLogger("dynlm")
Column = Literal["bits_per_byte", "gain_nats_per_token", "word_ppl", "token_ppl", "nats", "tokens_per_s"]
Read = Callable[[str, InnerLoop, list[TokenizedArticle]], Scores]
"""(method, its reader, articles): every loss"""


class Results:
    """What an evaluation found. ``data`` is the content of results.json; ``scores`` hold every loss.

    ``results["gated"]`` holds the figures of one method; ``print(results)`` shows all of them.
    """

    def __init__(
        self,
        data: results.Results,
        scores: Mapping[str, Scores],
        articles: Sequence[TokenizedArticle],
        tokenizer: Tokenizer,
    ) -> None:
        self.data, self.scores, self.articles, self.tokenizer = data, scores, articles, tokenizer

    def __repr__(self) -> str:
        return f"Results({len(self.articles)} articles, {self.data['tokens']:,} tokens, {', '.join(self.methods)})"

    def __str__(self) -> str:
        return self.table()

    def __getitem__(self, method: str) -> results.MethodResult:
        return self.data["methods"][method]

    @property
    def methods(self) -> list[str]:
        """Their names, the best last."""
        found = self.data["methods"]
        return sorted(found, key=lambda name: -found[name]["nats"])

    def table(self, form: Literal["text", "markdown", "latex", "csv"] = "text") -> str:
        """Return a line for each method: bits per byte, gain with its 95 % interval, word perplexity, speed.

        Forms other than ``text`` are tables to paste (dynlm.report.tables).
        """
        if form != "text":
            return tables.table(self.data, form)
        lines = []
        for name in self.methods:
            method = self[name]
            low, high = method["gain_ci95"] or (math.nan, math.nan)
            lines.append(
                f"{name:>12}  {_number(method['bits_per_byte'], '.4f')} bits/byte"
                f"  gain {method['gain_nats_per_token']:+.4f} [{low:+.4f}, {high:+.4f}] nats/token"
                f"  word perplexity {_number(method['word_ppl'], ',.4g')}  {method['tokens_per_s']:,.0f} tokens/s"
            )
        return "\n".join(lines)

    def to_pandas(self) -> pandas.DataFrame:
        """Return a row for each method.

        Raises:
            InputError: pandas is not installed.
        """
        columns: tuple[Column, ...] = get_args(Column)
        return frame({name: [self[method][name] for method in self.methods] for name in columns}, self.methods)

    @staticmethod
    def compare(first: str | Path, second: str | Path, page: str | Path = "") -> SideBySide:
        """Set two finished evaluations side by side: paired differences over the articles that both read.

        ``print(compared.table())`` shows them, ``compared.differences`` holds them (dynlm.report.pairing).

        Args:
            first: a run directory, or a folder that :meth:`save` has written.
            second: another one.
            page: where to write all of it as one HTML page, if anywhere.

        Raises:
            InputError: an evaluation is missing, or they have no article in common.
        """
        with optional("a report"):
            from dynlm.report.pairing import side_by_side
            from dynlm.report.versus import render_versus

        compared = side_by_side(Run(first), Run(second))
        if page:
            write_text(Path(page), render_versus(compared))
        return compared

    def save(self, folder: str | Path) -> None:
        """Write FOLDER/evaluate/results.json and, beside it, every loss (dynlm.evaluation.compare)."""
        run = Run(folder)
        run.evaluation.mkdir(parents=True, exist_ok=True)
        write_results(run, self.scores, self.articles, self.data)

    def report(self, folder: str | Path) -> Path:
        """Save, and write FOLDER/report.html, which needs nothing but itself; returns its path."""
        self.save(folder)
        with optional("a report"):
            from dynlm.report.html import write_report

        return write_report(Run(folder), pieces=self.tokenizer.pieces, vocab_size=self.tokenizer.vocab_size)


def _number(value: float | None, form: str) -> str:
    """A figure, or a dash where there is none: a perplexity beyond all numbers, bits per byte of text that was lost."""
    return "–" if value is None else format(value, form)


def evaluate_readers(
    readers: Mapping[str, InnerLoop],
    session: Session,
    texts: Sequence[Article],
    *,
    train_texts: Iterable[str] = (),
    gate_articles: int = 8,
    read: Read | None = None,
    about: results.Data | None = None,
) -> Results:
    """Read ``texts`` with every reader; a method that diverges is left out, with a note.

    Args:
        readers: by the name of the method; ``static``, the baseline of every gain, must be among them.
        train_texts: the text that the model was trained on, for the gain by how often it holds a word.
        gate_articles: of how many articles COPY, UPDATE and FLUSH are recorded.
        read: reads with one method; it may take what was kept from before.
        about: where the texts come from, as results.json says it; they are given, without it.

    Raises:
        InputError: no text, no ``static``.
        DivergedError: the static reading of the model gives a loss that is not finite.
    """
    if "static" not in readers:
        raise InputError(f"methods {list(readers)} lack 'static', the baseline of every gain: add it")
    tokenizer, articles = session.tokenizer, session.tokenize(texts)
    if not articles:
        raise InputError("no article to read: give at least one")
    read = read or (
        lambda name, reader, articles: read_method(name, reader, articles, tokenizer.start_id, gate_articles)
    )
    scores, diverged = dict[str, Scores](), dict[str, str]()
    for name, reader in readers.items():
        try:
            scores[name] = read(name, reader, articles)
        except DivergedError as error:  # the other methods go on, but without the baseline there is nothing to say
            if name == "static":
                raise
            diverged[name] = str(error)
            log.warning(f"{name} diverged and is left out: {error}")
    lost = lost_share(tokenizer, (session.spaced(text).text for text in texts))
    if lost:
        log.warning(f"the tokenizer loses {lost:.2%} of the text, so bits per byte are not given")
    counts = count(articles)
    described = {name: describe(name, readers[name].rule, settings_of(readers[name])) for name in scores}
    summary = summarize(scores, described, counts, lossless=not lost)
    words = Counter(word for text in train_texts for word in text.split())
    config = session.config
    breakdowns = break_down(scores, ArticlesRead(articles, tokenizer, words, config.segment, config.reset))
    data: results.Results = {
        "data": about or read_of(texts),
        **circumstances(session, counts),
        **summary,
        "breakdowns": breakdowns,
        "diverged": diverged,
        "asked": {},
    }
    return Results(data, scores, articles, tokenizer)


def read_method(
    name: str, reader: InnerLoop, articles: list[TokenizedArticle], start_id: int, gate_articles: int = 0
) -> Scores:
    """Read with one method; ``gate_articles`` counts for nothing beside a cache or mixture: a rule does as alone."""
    if reader.rule.reads_gradient:
        with suppress(DivergedError), reader:  # kernels are built outside the timed pass
            reader.read(dataclasses.replace(articles[0], ids_T=articles[0].ids_T[:128]), start_id)
    own = share(list(map(len, articles)), divided=reader.config.reset == "article")
    with Bar(
        total=sum(len(articles[number]) for number in own), desc=f"read {name}", unit="token", unit_scale=True
    ) as bar:
        gate_articles = 0 if Method.parse(name).beside else gate_articles
        return read_and_watch(reader, articles, start_id, bar.update, gate_articles)


def settings_of(reader: InnerLoop) -> dict[str, float]:
    """Return the settings of a reader's rule, and of its cache where there is one."""
    cache = reader.cache if isinstance(reader, CachedReader | MixedReader) else None
    of_cache = asdict(cache) if cache else {}
    return {**reader.rule.settings(), **{f"cache.{name}": value for name, value in of_cache.items()}}


def read_of(
    texts: Sequence[Article], source: str = "given", split: str = "test", fingerprint: str = ""
) -> results.Data:
    """Return what results.json says of the texts; ``fingerprint`` is that of the corpus, or else of them alone."""
    return {
        "source": source,
        "split": split,
        "titles": [text.title for text in texts],
        "fingerprint": fingerprint or Corpus((), (), (), tuple(texts)).fingerprint,
    }


def circumstances(session: Session, counts: Counts) -> results.Circumstances:
    """Return what results.json says of model, sizes and versions."""
    import transformers

    model, tokenizer = session.model, session.tokenizer
    prints: Mapping[str, Any] = session.stamp.fingerprints if session.stamp else {}
    return {
        "reset": session.config.reset,
        "segment": session.config.segment,
        "model": {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "adapted": sum(p.theta0.numel() for p in session.priors),
            "fingerprint": model_fingerprint(session.priors, model),
        },
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            **({"fingerprint": prints["tokenizer"]} if prints else {}),
        },
        "versions": {
            "dynlm": dynlm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "articles": counts.articles,
        "tokens": counts.tokens,
        "words": counts.words,
        "bytes": counts.bytes,
    }


def report_of_run(run: Run, formats: str = "", titles: Sequence[str] = ()) -> Path:
    """Write the report of a finished evaluation of a run directory; returns its path.

    Raises:
        InputError: no evaluation, or one that was made with another tokenizer.
    """
    with optional("a report"):
        from dynlm.report.html import write_report

    run.require(run.results, "evaluate")
    used = results.load_results(run.results).get("tokenizer", {}).get("fingerprint")
    if run.tokenizer.is_dir() and used not in (None, fingerprint_files(run.tokenizer)):
        raise InputError(f"{run.tokenizer} is not the tokenizer that {run.results} was made with: evaluate again")
    tokenizer = load_tokenizer(run.tokenizer) if run.tokenizer.is_dir() else None
    pieces, vocab_size = (tokenizer.pieces, tokenizer.vocab_size) if tokenizer else (None, None)
    return write_report(run, formats, pieces, titles, vocab_size)


def told(found: results.Results) -> Json:
    """Return what ``--json`` shows of an evaluation."""
    names = ("bits_per_byte", "gain_nats_per_token", "gain_ci95", "word_ppl", "tokens_per_s")
    methods = {name: {k: v for k, v in method.items() if k in names} for name, method in found["methods"].items()}
    counts = Counts(found["articles"], found["tokens"], found["words"], found["bytes"])
    return {"methods": methods, "diverged": found.get("diverged", {}), **counts._asdict()}
