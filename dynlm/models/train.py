"""Ordinary training of the base language model: the long memory θ0.

Truncated backpropagation over parallel streams with carried hidden state, AdamW, one learning-rate cycle.
``accelerate`` places the model, averages gradients over processes and sets the precision. A checkpoint after every
validation makes ``--resume`` bitwise exact on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from dynlm.changes import Changes, changing
from dynlm.checkpoints import (
    load_optimizer,
    log_of,
    optimizer_layout,
    optimizer_tensors,
    progress_of,
    resuming,
    write_log,
)
from dynlm.data.segments import training_streams
from dynlm.files import Json, read_tensors, require_layout, write_tensors
from dynlm.interrupt import Interrupted, Interruptible
from dynlm.models.core import Hidden
from dynlm.models.lstm import LSTMForCausalLM
from dynlm.processes import count, exchanged, largest, once, rank
from dynlm.progress import Bar
from dynlm.runs import Run
from dynlm.settings import AnyFloat, Count, NotNegative, Positive, Seed, Settings, Share, Whole, as_json
from dynlm.tracking import Track, untracked
from dynlm.types import InputError, TokenizedArticle, perplexity


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Base training."""

    epochs: Count = 8
    """passes over the train split"""
    max_steps: Whole = 0
    """training, and the rate's cycle with it, ends after so many steps; 0: after the passes"""
    batch_size: Count = 32
    """parallel streams"""
    segment: Count = 64
    """tokens of one backpropagation window"""
    lr: NotNegative = 3e-3
    """peak learning rate of the cycle (warm-up over the first tenth, then cosine to zero)"""
    weight_decay: NotNegative = 0.01
    """AdamW's decoupled decay, a step"""
    reset: Share = 0.0
    """probability that a stream's hidden state is zero before a window, as it is at the start of an article"""
    clip: Positive = 0.5
    """bound on the norm of the gradient"""
    validations_per_epoch: Count = 1
    """each one validates and writes a checkpoint"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto takes bf16 on CUDA and on CPUs that multiply it (AMX, AVX-512 BF16)"""
    seed: Seed = 0
    """order of articles, initial weights and dropout"""


MIXED = {"fp32": "no", "bf16": "bf16"}
"""what accelerate calls the precisions"""


class Progress(NamedTuple):
    """Where training stands. ``best`` is validation nats per token."""

    step: Whole = 0
    best: AnyFloat = math.inf
    seconds: NotNegative = 0.0


def train_base_model(
    model: LSTMForCausalLM,
    articles: tuple[Sequence[TokenizedArticle], Sequence[TokenizedArticle]],
    config: TrainConfig,
    run: Run,
    save_best: Callable[[LSTMForCausalLM, Changes], None],
    resume: bool = False,
    *,
    track: Track = untracked,
) -> Progress:
    """Train ``model`` on (train, valid) articles; ``save_best`` gets it after each best validation.

    What it writes through the changes that it gets, the log and the checkpoint change together. ``track`` gets the
    loss of each step and of each validation, in nats per token.

    Raises:
        InputError: a loss that is not finite (earlier files stay), or a checkpoint that does not fit.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=MIXED[choose_precision(config)[0]])
    trainer = _Trainer(model, articles, config, accelerator)
    path = run.checkpoint("train")
    if resume:
        trainer.load(*read_tensors(path))
    started = time.perf_counter() - trainer.progress.seconds
    bar = Bar(trainer.total_steps, "train", initial=trainer.progress.step)
    with bar, Interruptible() as signals:
        for loss in trainer.steps():
            bar.update()
            step = trainer.progress.step
            track({"train": loss}, step)
            seconds = time.perf_counter() - started
            if step % 10 == 0:
                speed = trainer.tokens_per_step * step / seconds
                bar.set_postfix_str(f"{speed:,.0f} tokens/s, loss {loss:.3f} nats/token")
            if step % trainer.steps_per_validation == 0 or step == trainer.total_steps:
                _validate(trainer, run, save_best, loss, seconds)
                track({"valid": trainer.records[-1]["valid"]}, step)
                bar.write(trainer.told())
            asked = largest(signals.asked)
            if asked and step < trainer.total_steps:
                _leave(trainer, run, asked, time.perf_counter() - started)
    return trainer.progress


def _validate(
    trainer: _Trainer,
    run: Run,
    save_best: Callable[[LSTMForCausalLM, Changes], None],
    loss: float,
    seconds: float,
) -> None:
    """Validate, and write the model if it is the best so far, with log and checkpoint."""
    step, valid = trainer.progress.step, trainer.validate()
    improved = valid < trainer.progress.best
    trainer.progress = Progress(step, min(valid, trainer.progress.best), seconds)
    trainer.records.append({"step": step, "train": loss, "valid": valid, "seconds": round(seconds, 1)})
    with changing(run.path) as new:
        if improved:
            save_best(trainer.bare_model, new)
        write_log(new.at(run.log("train")), trainer.records)
        write_tensors(new.at(run.checkpoint("train")), *trainer.state())


def _leave(trainer: _Trainer, run: Run, signal_number: int, seconds: float) -> None:
    """Save a checkpoint, if a first model stands in the run that it belongs to, and end."""
    step = trainer.progress.step
    if math.isinf(trainer.progress.best):
        raise Interrupted("interrupted before the first validation: nothing was saved", signal_number)
    trainer.progress = trainer.progress._replace(seconds=seconds)
    once(partial(write_tensors, run.checkpoint("train"), *trainer.state()))
    raise Interrupted(f"interrupted after step {step}, which is saved: --resume goes on from there", signal_number)


class _Trainer:
    """Model, optimizer, data position: all that a checkpoint must hold."""

    def __init__(
        self,
        model: LSTMForCausalLM,
        articles: tuple[Sequence[TokenizedArticle], Sequence[TokenizedArticle]],
        config: TrainConfig,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.train_articles, valid = articles
        workers = accelerator.num_processes
        if config.batch_size % workers:
            message = f"batch_size {config.batch_size} does not divide over {workers} processes"
            raise InputError(message, setting="train.batch_size")
        self.local = slice(
            accelerator.process_index * (config.batch_size // workers),
            (accelerator.process_index + 1) * (config.batch_size // workers),
        )
        self.valid_streams = training_streams(valid, min(16, max(1, sum(map(len, valid)) // 64)), seed=0)
        self.valid_tokens_per_word = sum(map(len, valid)) / sum(a.n_words for a in valid)
        tokens = sum(map(len, self.train_articles))
        length = tokens // config.batch_size
        if length < 2:
            raise InputError(
                f"batch_size is {config.batch_size}, for {tokens} training tokens: at most {tokens // 2}",
                setting="train.batch_size",
            )
        self.steps_per_epoch = math.ceil((length - 1) / config.segment)
        self.steps_per_validation = math.ceil(self.steps_per_epoch / config.validations_per_epoch)
        self.total_steps = self.steps_per_epoch * config.epochs
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.tokens_per_step = config.batch_size * config.segment
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )
        self.bare_model = model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.hidden: Hidden | None = None
        self.progress, self.records = Progress(), list[Json]()
        torch.manual_seed(config.seed + accelerator.process_index)

    def told(self) -> str:
        """Return a line on the last validation."""
        record = self.records[-1]
        word_ppl = perplexity(record["valid"] * self.valid_tokens_per_word, 1)
        return f"step {record['step']}: validation {record['valid']:.4f} nats/token, word perplexity {word_ppl:.1f}"

    def steps(self) -> Iterator[float]:
        """Training steps from the present position to the end; yields the mean loss in nats per token."""
        segment = self.config.segment
        while self.progress.step < self.total_steps:
            epoch, first = divmod(self.progress.step, self.steps_per_epoch)
            streams = training_streams(self.train_articles, self.config.batch_size, seed=self.config.seed + epoch)
            streams = streams[self.local].to(self.accelerator.device)
            if first == 0:
                self.hidden = None
            for index in range(first, min(self.steps_per_epoch, first + self.total_steps - self.progress.step)):
                window = streams[:, index * segment : (index + 1) * segment + 1]
                loss = self._step(window)
                self.progress = self.progress._replace(step=self.progress.step + 1)
                yield loss

    def _step(self, window: Tensor) -> float:
        step = self.progress.step
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * cycle(step / self.total_steps)
        self.model.train()
        if self.hidden is not None and self.config.reset:
            kept_B1 = torch.rand(window.shape[0], 1, device=window.device) >= self.config.reset
            self.hidden = tuple((h * kept_B1, c * kept_B1) for h, c in self.hidden)
        with self.accelerator.autocast():
            output = self.model(window[:, :-1], hidden=self.hidden, targets=window[:, 1:])
        value = fmean(exchanged(float((output.loss - output.penalty).detach())))
        if not math.isfinite(value):
            message = f"training loss is {value} at step {step}: lower lr ({self.config.lr:g})"
            raise InputError(message, setting="train.lr")
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(output.loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.hidden = tuple((h.detach(), c.detach()) for h, c in output.hidden)
        return value

    @torch.no_grad()
    def validate(self) -> float:
        """Nats per token over the valid split, read as parallel streams (fast; `dynlm evaluate` reads by article)."""
        self.model.eval()
        streams, hidden, nats = self.valid_streams.to(self.accelerator.device), None, 0.0
        width = 128
        for start in range(0, streams.shape[1] - 1, width):
            window = streams[:, start : start + width + 1]
            with self.accelerator.autocast():
                output = self.model(window[:, :-1], hidden=hidden)
            hidden = output.hidden
            logits = output.logits.flatten(0, 1).float()
            nats += F.cross_entropy(logits, window[:, 1:].flatten(), reduction="sum").item()
        return nats / (streams.shape[0] * (streams.shape[1] - 1))

    def state(self) -> tuple[dict[str, Tensor], Json]:
        tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in self.bare_model.named_parameters()}
        tensors |= optimizer_tensors(self.optimizer)
        own: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            own["rng.cuda"] = torch.cuda.get_rng_state()
        for layer, (h, c) in enumerate(self.hidden or ()):
            own |= {f"hidden.{layer}.h": h.cpu(), f"hidden.{layer}.c": c.cpu()}
        parts = exchanged(own)  # what each process has of its own streams
        tensors |= {name: torch.cat([part[name] for part in parts]) for name in own}
        settings = as_json(self.config)
        return tensors, {"progress": self.progress._asdict(), "config": settings, "log": self.records}

    def load(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        with resuming(meta, self.config, "train", "model"):
            require_layout("it", tensors, self.layout(tensors), advice="")
            progress, records = progress_of(Progress, meta, self.total_steps), log_of(meta)
            with torch.no_grad():
                for name, parameter in self.bare_model.named_parameters():
                    parameter.copy_(tensors[f"model.{name}"])
            load_optimizer(self.optimizer, tensors)
            device, layers = self.accelerator.device, self.bare_model.config.num_hidden_layers
            hidden = [(tensors[f"hidden.{i}.h"], tensors[f"hidden.{i}.c"]) for i in range(layers)]
            self.hidden = tuple((h[self.local].to(device), c[self.local].to(device)) for h, c in hidden)
            torch.set_rng_state(tensors["rng.cpu"].chunk(count())[rank()].clone())
            if torch.cuda.is_available() and "rng.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["rng.cuda"].chunk(count())[rank()].clone())
            self.progress, self.records = progress, records

    def layout(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a checkpoint must hold; of ``tensors``, whether it is one of a CUDA device."""
        random = torch.get_rng_state()
        made_by = tensors["rng.cpu"].numel() // random.numel() if "rng.cpu" in tensors else count()
        if made_by != count():  # each draws dropout of its own
            raise InputError(f"it was made by {made_by} processes, not by {count()}: resume with as many")
        layout: dict[str, Tensor] = {f"model.{name}": p for name, p in self.bare_model.named_parameters()}
        layout |= optimizer_layout(self.optimizer, tensors)
        for layer, (h, c) in enumerate(self.bare_model.initial_hidden(self.config.batch_size)):
            layout |= {f"hidden.{layer}.h": h, f"hidden.{layer}.c": c}
        layout["rng.cpu"] = random.repeat(count())
        return layout | ({"rng.cuda": tensors["rng.cuda"]} if "rng.cuda" in tensors else {})


def cycle(fraction: float, warmup: float = 0.1) -> float:
    """Learning-rate multiplier at ``fraction`` of training: linear to 1, then cosine to 0."""
    if fraction < warmup:
        return max(fraction / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))


def choose_precision(config: TrainConfig) -> tuple[Literal["fp32", "bf16"], str]:
    """(precision, why): what the recipe says, or for ``auto`` what the device multiplies fastest (docs/LOG.md)."""
    if config.precision != "auto":
        return config.precision, "train.precision"
    if torch.cuda.is_available():
        return ("bf16", "this GPU has it") if torch.cuda.is_bf16_supported() else ("fp32", "this GPU has no bfloat16")
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return "bf16", "this CPU multiplies it"
    return "fp32", "this CPU has neither AMX nor AVX-512 BF16"
