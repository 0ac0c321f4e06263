"""What one does with a reader, a model or a run, each in one call: evaluate, tune, meta-train, audit."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlm.changes import Changes, changing
from dynlm.data.texts import Source, Text, as_texts
from dynlm.data.tokenizers import HuggingFaceTokenizer
from dynlm.evaluation.audit import Verdict, adds_up
from dynlm.evaluation.audit import audit as audit_method
from dynlm.evaluation.stream import read_articles
from dynlm.files import Json
from dynlm.inner import InnerLoop
from dynlm.meta.train import MetaConfig, MetaProgress, MetaTrainer, divide_meta_split
from dynlm.meta.train import meta_train as meta_training
from dynlm.meta.tune import TuneConfig, tune_rule
from dynlm.optim.base import Rule
from dynlm.optim.hub import load_learned
from dynlm.optim.library import start_rule
from dynlm.optim.registry import RULES
from dynlm.optim.sharing import save_rule
from dynlm.progress import Bar
from dynlm.runs import Run
from dynlm.session.evaluation import Results, evaluate_readers
from dynlm.session.reader import Reader
from dynlm.session.ready import best_untuned, given_session, untuned, untuned_rule
from dynlm.session.session import Session
from dynlm.settings import as_json, build
from dynlm.tracking import Tracker, tracking
from dynlm.types import Article, InputError, TokenizedArticle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Readable = Reader | Session | str | Path
"""a reader, a session, or what :meth:`Reader.from_pretrained` takes"""


def evaluate(
    reader_or_model: Readable | PreTrainedModel,
    articles: Source | Iterable[Source],
    methods: Sequence[str | Rule] = (),
    *,
    gate_articles: int = 8,
) -> Results:
    """Read articles with several methods and compare their losses on identical tokens.

    Args:
        reader_or_model: a reader, what :meth:`Reader.from_pretrained` takes, or a model of transformers.
        articles: texts, files or articles; each is read from the trained weights (read.reset article).
        methods: rules, by name or themselves, and what ``evaluate.methods`` of a recipe takes (``static``,
            ``stateless``, ``rms+cache``, ``gated+mix``). Without any: static and the reader's own rule, or every rule
            that there is.
        gate_articles: of how many articles COPY, UPDATE and FLUSH are recorded.

    Returns:
        Losses of every token in nats; gains in nats per token, paired with static reading, with 95 % intervals.

    Raises:
        InputError: no article, a method that is not there or is named twice.
        DivergedError: static reading itself gives a loss that is not finite. Other methods are left out, with a note.
    """
    session = as_session(reader_or_model)
    chosen = list(methods) or ["static", *_own_methods(reader_or_model, session)]
    if "static" not in chosen:
        chosen.insert(0, "static")
    readers: dict[str, InnerLoop] = {}
    for method in chosen:
        name = method if isinstance(method, str) else _free_name(method.name, readers)
        if name in readers:
            raise InputError(f"methods names {name!r} twice: name each method once")
        readers[name] = _method(session, method)
    return evaluate_readers(readers, session, as_articles(articles), gate_articles=gate_articles)


def tune(
    reader_or_model: Readable | PreTrainedModel,
    articles: Source | Iterable[Source],
    /,
    rule: str = "rms",
    **settings: Any,
) -> Rule:
    """Find the settings of a hand-made rule with the fewest nats a token on articles that the model was not trained on.

    Args:
        reader_or_model: as for :func:`evaluate`.
        articles: what is read in each trial.
        rule: sgd, rms, adam, or one that :func:`dynlm.optim.register` made known.
        settings: of :class:`dynlm.meta.tune.TuneConfig`: trials, articles, max_tokens, seed.

    Returns:
        The rule; how it was found is its ``made``.

    Raises:
        InputError: no article, a rule that has nothing to tune.
        DivergedError: no setting that was tried reads to the end.
    """
    session = as_session(reader_or_model)
    config: TuneConfig = build(TuneConfig, {"rules": [rule], **settings}, "tune")
    texts = session.tokenize(as_articles(articles))
    with Bar(total=config.trials, desc=f"tune {rule}", unit="trial") as bar:
        found = tune_rule(rule, session.reader, texts, session.tokenizer.start_id, config, bar.update)
    found.rule.made = {
        "nats_per_token": found.nats_per_token,
        "static_nats_per_token": found.static,
        "trials": found.trials,
        "at_bound": list(found.at_bound),
        "config": as_json(config),
    }
    return found.rule


def meta_train(
    reader_or_model: Readable | PreTrainedModel,
    articles: Source | Iterable[Source],
    /,
    start: Rule,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    trackers: Sequence[str | Tracker] = (),
    **settings: Any,
) -> Rule:
    """Train a learned rule from a tuned hand-made one, on articles that the model was not trained on.

    Args:
        reader_or_model: as for :func:`evaluate`.
        articles: some are kept aside to choose φ (``validation_articles``).
        start: the hand-made rule that the learned one begins at: rms for gated and mlp.
        folder: where the best rule so far, the log, the checkpoint and what trackers write are kept; without one
            nothing is.
        resume: go on from the checkpoint in ``folder``.
        trackers: get each loss: names that accelerate knows (tensorboard, wandb, …), or trackers like accelerate's.
        settings: of :class:`dynlm.meta.train.MetaConfig`: rule, steps, articles, truncation, lr, seed, estimator, …

    Returns:
        The rule with the fewest nats per token on the articles kept aside; how it was trained is its ``made``.

    Raises:
        InputError: fewer than two articles, a start of another kind, settings that cannot be.
    """
    session = as_session(reader_or_model)
    config: MetaConfig = build(MetaConfig, settings, "meta")
    wanted = RULES[config.rule].start
    if start.name != wanted:
        raise InputError(f"start is a rule {start.name!r}: {config.rule} begins at {wanted}, tuned by dynlm.tune")
    texts, model = session.tokenize(as_articles(articles)), session.fingerprints(start)["model"]
    trainer, validate = rule_trainer(session, texts, start.settings(), config, model)
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        run = Run(place)
        run.path.mkdir(parents=True, exist_ok=True)
        made: Json = {"config": asdict(config), "start": start.settings()}

        def save_best(best: Rule, progress: MetaProgress, new: Changes) -> None:
            save_rule(best, new.at(run.rule(config.rule)), {**made, "progress": progress._asdict()})

        with tracking(trackers, "meta-train", run.trackers, made) as track:
            progress = meta_training(trainer, validate, run, save_best, resume, track=track)
        with changing(run.path) as new:
            save_best(trainer.best, progress, new)
            new.remove(run.checkpoint("meta-train"))
    trainer.reader.restore()
    best = trainer.best
    best.made = {**made, "progress": progress._asdict()}
    return best


def rule_trainer(
    session: Session, articles: Sequence[TokenizedArticle], start: dict[str, float], config: MetaConfig, model: str
) -> tuple[MetaTrainer, Callable[[], float]]:
    """Return the trainer of a learned rule that begins at ``start``, and what reads the articles that choose φ.

    ``start`` are the settings of the tuned rule, ``model`` is the fingerprint that checkpoints keep; nats per token.
    """
    texts, held_back = divide_meta_split(articles, config)
    if config.phi and config.hidden:
        message = f"hidden is {config.hidden} beside phi {config.phi!r}, which has its own: give one of them"
        raise InputError(message, setting="meta.hidden")
    if config.phi:
        rule: Rule = load_learned(config.phi, config.rule, start)
    else:
        rule = start_rule(config.rule, start, session.priors, config.seed, config.hidden)
    reader = session.reader(rule)
    start_id, tokens = session.tokenizer.start_id, sum(map(len, held_back))
    trainer = MetaTrainer(reader, texts, start_id, config, model)
    return trainer, lambda: read_articles(reader, held_back, start_id).nats / tokens


def audit(reader: Readable, article: Source, later: Source, *, quick: bool = False) -> list[Verdict]:
    """Check that a reader scores before it learns, and leaves nothing behind.

    Args:
        reader: as for :func:`evaluate`; its own rule is audited.
        article: a text of some thousand tokens.
        later: another text, which is read after ``article``.
        quick: read short excerpts: a tenth of the time, and blind to what happens only after some segments.

    Returns:
        A verdict for each check: its name, whether it passed, and what was found.

    Raises:
        InputError: nothing to read.
    """
    session, rule, method = as_session(reader), None, None
    if isinstance(reader, Reader):
        rule, method = reader.rule, reader.method
    texts = [session.spaced(text) for text in as_articles([article, later])]
    first, second = session.tokenize(texts[:2])

    def make_reader() -> InnerLoop:
        if method:
            return session.method(method)
        return session.reader(copy.deepcopy(rule if rule is not None else session.rule()))

    found = audit_method(
        make_reader, first, second, session.tokenizer.start_id, session.tokenizer.vocab_size, quick=quick
    )
    return [adds_up(texts[0], first, session.tokenizer.decode), *found]


def as_session(source: Readable | PreTrainedModel) -> Session:
    """Return the session of a reader, of a name or path, or of a model of transformers with the tokenizer it came with.

    Raises:
        InputError: a model whose tokenizer is not beside it.
    """
    if isinstance(source, Session):
        return source
    if isinstance(source, Reader):
        return source.session
    if isinstance(source, str | Path):
        return Reader.from_pretrained(source).session
    return given_session(source, HuggingFaceTokenizer(source.name_or_path))


def as_articles(sources: Source | Iterable[Source]) -> list[Article]:
    """Return articles as they are, and texts and files as articles."""
    if isinstance(sources, str | Path | Article) or not isinstance(sources, Iterable):
        sources = [sources]
    articles = [text.article() if isinstance(text, Text) else text for source in sources for text in _texts(source)]
    names = Counter(article.id for article in articles)
    return [
        replace(article, id=f"{article.id} {number}", title=f"{article.title} {number}")
        if names[article.id] > 1
        else article
        for number, article in enumerate(articles, 1)
    ]


def _texts(source: Source) -> Iterable[Article | Text]:
    return [source] if isinstance(source, Article) else as_texts(source)


def _own_methods(source: object, session: Session) -> list[str | Rule]:
    if isinstance(source, Reader):
        return [source.method or source.rule] if source.method or source.rule.name != "static" else []
    return [*session.held()] or [best_untuned(session)]


def _free_name(name: str, taken: Iterable[str]) -> str:
    """Return the name of a rule, with a number where another one has it."""
    count = sum(other.partition("-")[0] == name for other in taken)
    return f"{name}-{count + 1}" if count else name


def _method(session: Session, method: str | Rule) -> InnerLoop:
    if isinstance(method, Rule):
        return session.reader(copy.deepcopy(method))
    if session.run is None and method in untuned():
        return session.reader(untuned_rule(method, session))
    return session.method(method)
