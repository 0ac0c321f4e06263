"""Meta-training: the reading rule learns from long stretches of reading.

Several articles are read side by side, a window of segments at a time; after each round of windows an estimator
(dynlm.meta.estimators) gives the meta-gradient and Adam moves φ. Truncation with carry: θ, s and h go on into the next
window, the graph does not. A part of the meta split is kept aside to choose the best φ and to stop early.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from dynlm.changes import Changes, changing
from dynlm.checkpoints import (
    fitting,
    load_optimizer,
    log_of,
    optimizer_layout,
    optimizer_tensors,
    progress_of,
    resuming,
    write_log,
)
from dynlm.data.segments import article_segments
from dynlm.files import Json, read_tensors, require_layout, write_tensors
from dynlm.inner import InnerLoop
from dynlm.interrupt import Interrupted, Interruptible
from dynlm.meta.estimators import EstimatorConfig, make_estimator
from dynlm.meta.forward import add_gradients
from dynlm.meta.positions import pack, unpack
from dynlm.optim.base import Rule
from dynlm.optim.registry import trained
from dynlm.processes import largest, once, require_work, share, spread
from dynlm.progress import Bar
from dynlm.runs import Run
from dynlm.settings import (
    WIDE,
    AnyFloat,
    Bound,
    Count,
    NotNegative,
    Positive,
    Seed,
    Settings,
    Size,
    Whole,
    as_json,
    check,
)
from dynlm.tracking import Track, untracked
from dynlm.types import InputError, TokenizedArticle


@dataclass(frozen=True)
class MetaConfig(Settings):
    """Meta-training of a learned rule."""

    rule: str = "gated"
    """learned cell to train: gated, linear, diagonal, lstm, gru, mlp or your own; it starts at a tuned rule"""
    phi: str = ""
    """what φ starts from: reader (the learned rule that ships) or a rule's file; without it the tuned rule itself"""
    steps: Count = 300
    """updates of φ"""
    articles: Size = 2
    """articles read side by side, each giving one window a step"""
    truncation: Count = 64
    """segments of one window: how far the meta-gradient sees"""
    lr: Positive = 1e-2
    """peak of Adam's learning rate on φ; cosine to zero over the steps"""
    clip: Positive = 1.0
    """bound on the norm of the meta-gradient (nats per token)"""
    hidden: Annotated[int, Bound(0, WIDE)] = 0
    """units of the rule's shared network; 0 is the cell's own default, or that of ``phi``"""
    validate_every: Count = 25
    """steps between readings of the meta-validation articles; each writes a checkpoint"""
    validation_articles: Count = 12
    """articles of the meta split that only choose φ"""
    patience: Count = 6
    """validations without improvement before stopping early"""
    average: Annotated[float, Bound(0, below=1)] = 0.9
    """share of the running mean of φ that a step leaves as it is; the mean is validated and kept; 0: φ itself"""
    seed: Seed = 0
    """of the cell's first weights, the order of articles and the sample; with another than 0 the rule is RULE#SEED"""
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in trained():
            raise InputError(f"rule is {self.rule!r}: expected one of {', '.join(map(repr, trained()))}")


def divide_meta_split(
    articles: Sequence[TokenizedArticle], config: MetaConfig
) -> tuple[list[TokenizedArticle], list[TokenizedArticle]]:
    """Return (articles that rules are tuned and trained on, articles that choose φ)."""
    if len(articles) < 2:
        message = f"the meta split has {len(articles)} articles: give at least 2"
        raise InputError(message, setting="data.meta_articles")
    n_valid = min(config.validation_articles, len(articles) // 2)
    return list(articles[n_valid:]), list(articles[:n_valid])


class MetaProgress(NamedTuple):
    """Where meta-training stands; ``best`` is meta-validation nats per token, ``stale`` validations since."""

    step: Whole = 0
    best: AnyFloat = math.inf
    stale: Whole = 0
    seconds: NotNegative = 0.0


SaveRule = Callable[[Rule, MetaProgress, Changes], None]
"""writes a rule through changes of a run directory"""


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """A warm-up over ten steps under a cosine to zero."""
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, (step + 1) / 10) * math.cos(math.pi / 2 * (step / steps)) ** 2


class Stream:
    """One article being read: its remaining segments and the reader's position in it."""

    def __init__(self, article: int, pieces: list[tuple[Tensor, Tensor]]) -> None:
        self.article, self.pieces = article, pieces
        self.done = 0
        self.position: Any = None


class _Window(NamedTuple):
    """What a process gives of a window: summed nats, tokens, and ∇φ of each tensor that has one."""

    nats: float
    tokens: int
    grads: list[Tensor | None]


class StreamRecord(TypedDict):
    """A stream in a checkpoint."""

    article: int
    done: int
    position: Json


class MetaTrainer:
    """Everything a checkpoint must hold: φ, its optimizer, the streams, the random state, the best φ and the log.

    Several processes share the streams. Each knows where all stand, and has the positions of its own; ∇φ of each window
    is all that they exchange, and it is summed in the order of the streams.
    """

    def __init__(
        self,
        reader: InnerLoop,
        articles: Sequence[TokenizedArticle],
        start_id: int,
        config: MetaConfig,
        model: str = "",
    ) -> None:
        """``model``: fingerprint of the base model, which a checkpoint keeps."""
        self.reader, self.rule, self.config = reader, reader.rule, config
        self.articles, self.start_id, self.model = articles, start_id, model
        self.phi = [p for p in self.rule.parameters() if p.requires_grad and p.numel()]
        self.optimizer = torch.optim.Adam(self.phi, lr=config.lr, betas=(0.9, 0.98))
        self.generator = torch.Generator().manual_seed(config.seed)
        self.estimator = make_estimator(reader, config.estimator)
        require_work(config.articles, "meta.articles")
        self.streams: list[Stream] = [self._fresh_stream() for _ in range(config.articles)]
        self.progress, self.records = MetaProgress(), list[Json]()
        self.mean = copy.deepcopy(self.rule)
        """the running mean of φ, which is less noisy than φ (Polyak & Juditsky 1992)"""
        self.best = copy.deepcopy(self.rule)
        """the mean as it was where validation was lowest"""

    def step(self) -> float:
        """One window of each stream, then one update of φ; returns mean nats per token before the update.

        Raises:
            InputError: a meta-gradient or loss that is not finite; φ is what it was.
        """
        n = len(self.streams)
        seeds = torch.randint(2**62, (n,), generator=self.generator).tolist()
        windows = spread(lambda i: self._window(i, seeds[i]), [1.0] * n)
        for i in range(n):
            self._move(i)
        self.optimizer.zero_grad(set_to_none=True)
        for window in windows:
            add_gradients(self.phi, window.grads)
        norm = torch.nn.utils.clip_grad_norm_([p for p in self.phi if p.grad is not None], self.config.clip)
        if not torch.isfinite(norm):
            raise InputError(
                f"meta-gradient is {float(norm)} at step {self.progress.step}: lower lr", setting="meta.lr"
            )
        set_rate(self.optimizer, self.config.lr, self.progress.step, self.config.steps)
        self.optimizer.step()
        self._average()
        self.progress = self.progress._replace(step=self.progress.step + 1)
        return sum(window.nats for window in windows) / sum(window.tokens for window in windows)

    @torch.no_grad()
    def _average(self) -> None:
        keep = min(self.config.average, self.progress.step / (self.progress.step + 10))  # the start is soon forgotten
        for mean, phi in zip(self.mean.parameters(), self.rule.parameters(), strict=True):
            mean.lerp_(phi, 1 - keep)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the reader's rule has the running mean of φ."""
        phi = copy.deepcopy(self.rule.state_dict())
        self.rule.load_state_dict(self.mean.state_dict())
        try:
            yield
        finally:
            self.rule.load_state_dict(phi)

    def _window(self, i: int, seed: int) -> _Window:
        """Read one window of stream ``i``, which is this process's; ``seed`` is of what the estimator draws for it."""
        stream, config = self.streams[i], self.config
        self.estimator.generator.manual_seed(seed)
        self.optimizer.zero_grad(set_to_none=True)
        position = self.estimator.begin() if stream.position is None else stream.position
        full = config.truncation * self.reader.config.segment * len(self.streams)
        pieces = stream.pieces[stream.done : stream.done + config.truncation]
        window = self.estimator.window(position, pieces, [targets_S.numel() / full for _, targets_S in pieces])
        stream.position = window.position
        return _Window(window.nats, window.tokens, [None if p.grad is None else p.grad.cpu() for p in self.phi])

    def _move(self, i: int) -> None:
        """Stream ``i`` moves on by a window, or is replaced; in every process."""
        stream = self.streams[i]
        stream.done += self.config.truncation
        if stream.done + 8 > len(stream.pieces):  # a window needs a few segments to learn from
            self.streams[i] = self._fresh_stream()

    def _fresh_stream(self) -> Stream:
        article = int(torch.randint(len(self.articles), (), generator=self.generator))
        return self._stream(article)

    def _stream(self, article: int) -> Stream:
        ids_T = self.articles[article].ids_T.to(self.reader.parameters[0].device)
        return Stream(article, list(article_segments(ids_T, self.start_id, self.reader.config.segment)))

    def _rules(self) -> dict[str, Rule]:
        """Return what a checkpoint holds of rules, by the first part of its tensors' names."""
        return {"phi.": self.rule, "mean.": self.mean, "best.": self.best}

    def state(self) -> tuple[dict[str, Tensor], Json]:
        tensors: dict[str, Tensor] = {
            f"{prefix}{name}": p for prefix, rule in self._rules().items() for name, p in rule.named_parameters()
        }
        tensors |= optimizer_tensors(self.optimizer)
        tensors["rng"] = self.generator.get_state()
        streams = []
        for stream, (position, held) in zip(self.streams, self._positions(), strict=True):
            streams.append({"article": stream.article, "done": stream.done, "position": position})
            tensors |= held
        told = {"progress": self.progress._asdict(), "config": as_json(self.config), "log": self.records}
        return tensors, {**told, "model": self.model, "streams": streams}

    def _positions(self) -> list[tuple[Any, dict[str, Tensor]]]:
        """Return the position of each stream, packed, from the process that reads it."""

        def packed(i: int) -> tuple[Any, dict[str, Tensor]]:
            held = dict[str, Tensor]()
            position = pack(self.streams[i].position, f"stream.{i}", held)
            return position, {name: tensor.detach().cpu() for name, tensor in held.items()}

        return spread(packed, [1.0] * len(self.streams))

    def keep(self, run: Run, stage: str, save_best: SaveRule | None) -> None:
        """Write log and checkpoint, and the best rule too where there is a new one."""
        with changing(run.path) as new:
            if save_best:
                save_best(self.best, self.progress, new)
            write_log(new.at(run.log(stage)), self.records)
            write_tensors(new.at(run.checkpoint(stage)), *self.state())

    def load(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        with resuming(meta, self.config, "meta", model=self.model):
            progress, records = progress_of(MetaProgress, meta, self.config.steps), log_of(meta)
            layout = optimizer_layout(self.optimizer, tensors) | {"rng": self.generator.get_state()}
            for prefix, rule in self._rules().items():
                layout |= {f"{prefix}{name}": p for name, p in rule.named_parameters()}
            own = {name: tensor for name, tensor in tensors.items() if not name.startswith("stream.")}
            require_layout("it", own, layout, advice="")
            for prefix, rule in self._rules().items():
                rule.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            load_optimizer(self.optimizer, tensors)
            self.generator.set_state(tensors["rng"])
            streams = check(list[StreamRecord], meta.get("streams"), "streams")
            own_streams = share([1.0] * len(self.streams))
            for i, record in zip(range(len(self.streams)), streams, strict=True):
                if not 0 <= record["article"] < len(self.articles):
                    raise InputError(f"it reads article {record['article']} of {len(self.articles)}")
                self.streams[i] = stream = self._stream(record["article"])
                stream.done = record["done"]
                if not 0 <= stream.done < len(stream.pieces):
                    raise InputError(f"it is at segment {stream.done} of {len(stream.pieces)}")
                if i in own_streams:
                    stream.position = unpack(record["position"], tensors, self.reader.parameters[0].device)
            self.progress, self.records = progress, records


def meta_train(
    trainer: MetaTrainer,
    validate: Callable[[], float],
    run: Run,
    save_best: SaveRule,
    resume: bool = False,
    stage: str = "meta-train",
    *,
    track: Track = untracked,
) -> MetaProgress:
    """Train φ until the steps are done or validation stops improving; ``save_best`` gets each best rule.

    What it writes through the changes that it gets, the log and the checkpoint change together. The best rule of all is
    ``trainer.best``. ``validate`` reads the meta-validation articles with the present φ and returns nats per token;
    ``stage`` names checkpoint and log. ``track`` gets the loss of each step and validation, in nats per token.
    """
    config, path = trainer.config, run.checkpoint(stage)
    if resume:
        trainer.load(*read_tensors(path))
    first, started = trainer.progress.step, time.perf_counter() - trainer.progress.seconds
    bar = Bar(config.steps, "meta-train", initial=trainer.progress.step)
    with bar, Interruptible() as signals:
        if math.isinf(trainer.progress.best):
            trainer.progress = trainer.progress._replace(best=validate())
            trainer.keep(run, stage, save_best)
            track({"valid": trainer.progress.best}, 0)
            start = f"φ of {config.phi}" if config.phi else "the tuned hand-made rule"
            bar.write(f"start, {start}: meta-validation {trainer.progress.best:.4f} nats/token")
        while trainer.progress.step < config.steps and trainer.progress.stale < config.patience:
            with fitting() if resume and trainer.progress.step == first else nullcontext():
                loss = trainer.step()
            bar.update()
            bar.set_postfix_str(f"reading {loss:.3f} nats/token")
            step = trainer.progress.step
            track({"train": loss}, step)
            due = step % config.validate_every == 0 or step == config.steps
            seconds = time.perf_counter() - started
            if due:
                with trainer.averaged():
                    valid = validate()
                improved = valid < trainer.progress.best
                stale = 0 if improved else trainer.progress.stale + 1
                trainer.progress = MetaProgress(step, min(valid, trainer.progress.best), stale, seconds)
                trainer.records.append({"step": step, "train": loss, "valid": valid, "seconds": round(seconds, 1)})
                if improved:
                    trainer.best.load_state_dict(trainer.mean.state_dict())
                trainer.keep(run, stage, save_best if improved else None)
                track({"valid": valid}, step)
                bar.write(
                    f"step {step}: meta-validation {valid:.4f} nats/token ({'best' if improved else 'no better'})"
                )
            asked = largest(signals.asked)
            if asked and step < config.steps:
                if not due:
                    trainer.progress = trainer.progress._replace(seconds=seconds)
                    once(partial(write_tensors, path, *trainer.state()))
                said = f"interrupted after step {step}, which is saved: --resume goes on from there"
                raise Interrupted(said, asked)
    return trainer.progress
