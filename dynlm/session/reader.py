"""A reader: a language model that learns while it reads, beside the same model that does not.

Both score the same tokens, each strictly before the update that sees it. Tokens are cut into segments as
:class:`dynlm.inner.InnerLoop` cuts an article, whatever the chunks a text comes in.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from dynlm.data.spacing import Spacer
from dynlm.data.texts import Source, Text, as_texts, encode_chunk, surfaces
from dynlm.files import replacing
from dynlm.inner import InnerLoop, Snapshot
from dynlm.lazy import optional
from dynlm.methods import Method
from dynlm.optim.base import Rule
from dynlm.optim.handmade import Static
from dynlm.session.memory import copied, load_memory, save_memory
from dynlm.session.reading import Reading
from dynlm.session.session import Session, is_run, load_session, loaded_rule
from dynlm.session.step import Step
from dynlm.types import DivergedError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOWER = 0.25
"""of the learning rate after a divergence"""
RESTARTS_TOLD = 5
log = logging.getLogger("dynlm")


class Reader:
    """A language model with its tokenizer and a rule that changes its weights while it reads.

    The model is leased while something is read, or inside a ``with`` block; outside it has its trained weights θ0, bit
    for bit. What was learned is kept beside it: ``adapted`` lends it out, and ``reset="never"`` reads on from it.

        reader = dynlm.Reader.from_pretrained("wikitext2")
        reading = reader.read("A text of some hundred words, in which names come again …")
        print(reading.gain, "nats per token over the same model without learning")
    """

    def __init__(
        self, session: Session, rule: Rule | str = "", *, spacing: Literal["auto", "none", "wikitext"] = "auto"
    ) -> None:
        """Make a reader of a session; :meth:`from_pretrained` makes both.

        Args:
            session: model, tokenizer, prior, settings and rules.
            rule: one of the session's by name, or any rule; without one its learned rule, or else rms. A name with
                ``+cache`` or ``+mix`` reads with the rule's cache or mixture beside it (dynlm.methods).
            spacing: "wikitext" puts ordinary text into the spacing of WikiText before it is read; "auto" does where the
                model was trained on that and the text has it not.

        Raises:
            InputError: a rule that the session has not.
        """
        self.session, self.spacing = session, spacing
        self.method: str | None = None
        """the name of a method with a cache or mixture"""
        if isinstance(rule, str) and rule and (method := Method.parse(rule)).beside:
            self.method = str(method)
            session.read_out(self.method)  # says at once where it is missing
            rule = str(method.alone)
        self.rule = session.rule(rule) if isinstance(rule, str) else rule
        self.read_from = ""
        """the memory that reading goes on from"""
        self._start: tuple[Snapshot, Any] | None = None
        self._readers: tuple[InnerLoop, InnerLoop] | None = None
        self._position: tuple[Any, Snapshot] | None = None
        """where reading stood when the lease ended: what static reading carries, and all of the adapted reader"""
        self._step: Step | None = None
        self._depth = 0

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | PreTrainedModel = "",
        rule: str | Rule = "",
        *,
        tokenizer: object = None,
        lr: float = 0.0,
        reset: Literal["article", "never"] = "article",
        spacing: Literal["auto", "none", "wikitext"] = "auto",
        **settings: Any,
    ) -> Reader:
        """Make a reader of a shipped model, a run directory, or any causal language model of transformers.

        Args:
            source: the name of a model that ships with dynlm ("" is the default one), a run directory, the folder, hub
                name or ``.gguf`` file of a model, or a model in memory with its ``tokenizer``.
            rule: of the run or shipped model, by name; of other models, untuned: gated (the learned rule that ships),
                rms, sgd, adam or static; or any rule.
            lr: learning rate of an untuned rule; 0 is a cautious one, from the size of the model's gradient.
            reset: "article" starts each text with the trained weights, "never" reads all texts as one stream.
            settings: of a model without a run: segment, params, carry, lora_rank, prior_text (see
                :func:`dynlm.session.ready.ready_session`; without lora_rank for a model in memory).

        Raises:
            InputError: nothing to read with there, or settings that do not go together.
        """
        if isinstance(source, str | Path) and is_run(source):
            if lr or settings:
                name = next(iter(settings), "lr")
                raise InputError(f"{name} is for a model without a run: a run's own is in its settings and rules")
            session = load_session(source, reset)
            return cls(session, loaded_rule(rule, session), spacing=spacing)
        return cls.of_model(source, rule, tokenizer=tokenizer, lr=lr, spacing=spacing, reset=reset, **settings)

    @classmethod
    def of_model(
        cls,
        source: str | Path | PreTrainedModel,
        rule: str | Rule = "",
        *,
        tokenizer: object = None,
        lr: float = 0.0,
        spacing: Literal["auto", "none", "wikitext"] = "auto",
        **settings: Any,
    ) -> Reader:
        """Make a reader of a model of transformers, whatever else lies in its folder: see :meth:`from_pretrained`."""
        with optional("a model of transformers"):
            from dynlm.session.ready import (
                best_untuned,
                given_session,
                ready_session,
                untuned_rule,
            )  # which takes seconds

        if isinstance(source, str | Path):
            session = ready_session(source, **settings)
        else:
            session = given_session(source, tokenizer, **settings)
        found = untuned_rule(rule or best_untuned(session), session, lr) if isinstance(rule, str) else rule
        return cls(session, found, spacing=spacing)

    def __repr__(self) -> str:
        return f"Reader({self.session!r}, rule {self.method or self.rule.name!r})"

    def __enter__(self) -> Reader:
        """Lease the model: inside, its weights are those that reading has reached."""
        if self._depth == 0:
            static, adapted = self._readers = self._readers or self.pair()
            static.__enter__()
            adapted.__enter__()
            if self._position is not None:
                carried, position = self._position
                static.carry(carried)
                adapted.resume(position)
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        assert self._readers is not None
        static, adapted = self._readers
        try:
            if error is None or isinstance(error, GeneratorExit):  # of a loop over steps that is left
                self._finish()
            self._step = None
        finally:
            self._position = static.carried(), adapted.snapshot()
            adapted.__exit__(kind, error, trace)
            static.__exit__(kind, error, trace)

    def pair(self) -> tuple[InnerLoop, InnerLoop]:
        """Make (static, adapted): the first reads with a copy of the model, the other with a copy of the rule."""
        session = self.session
        frozen, rule = copy.deepcopy(session.model), copy.deepcopy(self.rule).requires_grad_(False)
        priors = session.priors if rule.reads_gradient else session.still
        static = InnerLoop(frozen, session.scorer(frozen), Static(), priors, session.config)
        if self.method:
            adapted = session.method(self.method)
        else:
            adapted = session.reader(rule, priors=priors)
            adapted.taps = True
        return static, adapted

    @property
    def _pair(self) -> tuple[InnerLoop, InnerLoop]:
        assert self._readers is not None  # inside the lease
        return self._readers

    def read(self, *sources: Source) -> Reading:
        """Read texts in order and return every loss in nats, with and without learning.

        A source is a text, a :class:`~pathlib.Path` (.txt, .md, .html, .jsonl), or an :class:`Article`.

        Raises:
            InputError: nothing to read, a file that cannot be read, a string that is the name of a file.
            DivergedError: the trained weights themselves give a loss that is not finite.
        """
        reading = self.reading()
        with self:
            for source in sources:
                for _ in self.steps(source, reading):
                    pass
        reading.end()
        return reading

    def reading(self, *, tokens: bool = True, words: bool = True) -> Reading:
        """Return an empty record for :meth:`steps`; without ``tokens`` and ``words`` it stays small."""
        method = self.method or self.rule.name
        return Reading(self.session, self.rule, self.read_from, method=method, tokens=tokens, words=words)

    def steps(self, source: Source, reading: Reading | None = None) -> Iterator[Step]:
        """Read one text segment by segment: each step is scored, handed out, and learned from when the loop goes on.

        Args:
            source: as for :meth:`read`.
            reading: collects what is read.

        Raises:
            InputError: as :meth:`read`, and another reader that reads with this model.
            DivergedError: the trained weights themselves give a loss that is not finite.
        """
        reading = self.reading(tokens=False, words=False) if reading is None else reading
        for text in as_texts(source):
            with self:
                yield from self._steps(text, reading)

    def _steps(self, text: Text, reading: Reading) -> Iterator[Step]:
        if self.session.config.reset == "article":
            self.forget()
        self._finish()  # of a loop over steps that was left inside a lease
        reading.begin(text.title)
        size, previous = self.session.config.segment, self.session.tokenizer.start_id
        ids: list[int] = []
        texts: list[str] = []
        tokens = self._tokens()
        for chunk in text.chunks:
            new_ids, new_texts = tokens(chunk)
            ids += new_ids
            texts += new_texts
            whole = len(ids) - len(ids) % size
            for at in range(0, whole, size):
                yield self._scored(previous, ids[at : at + size], texts[at : at + size], reading)
                self._finish()
                previous = ids[at + size - 1]
            del ids[:whole], texts[:whole]
        if ids:
            yield self._scored(previous, ids, texts, reading)
            self._finish()

    def forget(self) -> None:
        """Go back to the trained weights, or to the memory that was loaded: what was read since is gone."""
        with self:
            static, adapted = self._pair
            self._step = None
            static.begin()
            adapted.begin()
            if self._start is not None:
                position, static.hidden = self._start
                adapted.resume(copied(position))

    @contextmanager
    def adapted(self) -> Iterator[PreTrainedModel]:
        """Lend the model with what was learned in its weights; afterwards it has its trained ones, bit for bit.

        Raises:
            InputError: a reader of `dynlm read`, whose LSTM is no model of transformers.
        """
        with self:
            self._finish()
            if not hasattr(self.session.model, "config"):
                raise InputError("this reader was loaded for reading only: make one with Reader.from_pretrained")
            yield cast("PreTrainedModel", self.session.model)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the adapted weights, low-rank ones merged, and the tokenizer as a folder of transformers.

        Raises:
            InputError: a folder that holds files already.
        """
        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{target} exists: give the name of a new folder")
        from dynlm.models.lora import merged  # transformers, which takes seconds

        with self.adapted() as model, replacing(target) as temporary:
            merged(model).save_pretrained(temporary)
            self.session.tokenizer.pretrained().save_pretrained(temporary)

    def save_memory(self, path: str | Path) -> None:
        """Write what reading changed, to read on from there: :meth:`load_memory` of a reader of the same model.

        Raises:
            InputError: weights that the last update left not finite.
        """
        self.require_memory()
        with self:
            self._finish()
            save_memory(Path(path), *self._pair, self._belongs())

    def load_memory(self, path: str | Path) -> None:
        """Begin each text from a memory that :meth:`save_memory` wrote.

        Raises:
            InputError: no memory, or one of another model or rule.
        """
        self.require_memory()
        with self:
            memory = load_memory(Path(path), self._pair[1], self._belongs())
            size = self.session.config.segment
            if memory.segment not in (None, size):
                log.info(f"{path} was made with updates every {memory.segment} tokens; now they come every {size}")
            self._start, self.read_from = (memory.position, memory.static_hidden), str(path)
            self.forget()

    def require_memory(self) -> None:
        """Refuse a memory of a method with a cache or mixture: it holds weights and rule state alone."""
        if self.method:
            raise InputError(f"a memory holds no cache or mixture: read with {self.rule.name!r}, not {self.method!r}")

    def _belongs(self) -> dict[str, Any]:
        """Return what a saved memory must agree with."""
        return self.session.fingerprints(self.rule) | {"carry": self.session.carry}

    def _tokens(self) -> Callable[[str], tuple[list[int], list[str]]]:
        """For the chunks of one text: (ids, the stretch of the text that each stands for)."""
        tokenizer = self.session.tokenizer
        wished = self.session.spacing if self.spacing == "auto" else self.spacing
        spacer = Spacer(auto=self.spacing == "auto") if wished == "wikitext" else None

        def tokens(chunk: str) -> tuple[list[int], list[str]]:
            spaced = spacer(chunk) if spacer else None
            source = spaced.text if spaced else chunk
            ids = encode_chunk(tokenizer, source)
            texts = surfaces(tokenizer.pieces(ids), source)
            return ids, spaced.originals(texts) if spaced else texts

        return tokens

    def _scored(self, previous: int, ids: Sequence[int], texts: list[str], reading: Reading) -> Step:
        """Score a segment under both weights. An error leaves both readers where they were before it."""
        started, totals = perf_counter(), reading.totals
        readers = static, adapted = self._pair
        piece = (torch.tensor([previous, *ids[:-1]]), torch.tensor(ids))
        on_device = piece[0].to(adapted.parameters[0].device), piece[1].to(adapted.parameters[0].device)
        carried = [reader.carried() for reader in readers]
        try:
            static_S = static.segment(*on_device).losses_S
            try:
                scored = adapted.scored(*on_device)
            except DivergedError:
                self._start_anew(carried[0], reading)
                scored = adapted.scored(*on_device)
        except BaseException:
            for reader, before in zip(readers, carried, strict=True):
                reader.carry(before)
            raise
        self._step = step = Step(texts, piece, static_S, scored, reader=adapted, totals=totals)
        unknown = (text for token, text in zip(ids, texts, strict=True) if token == self.session.tokenizer.unk_id)
        totals.unknown_bytes += len("".join(unknown).encode())
        totals.count("".join(texts))
        totals.seconds += perf_counter() - started
        reading.add(texts, step.static, step.losses)
        return step

    def _finish(self) -> None:
        """Make the update of the step that was handed out last."""
        step, self._step = self._step, None
        if step is not None:
            step.update()

    def _start_anew(self, static_hidden: Any, reading: Reading) -> None:
        """Go on after a divergence from θ0, as if nothing had been learned, with a lower rate of a hand-made rule."""
        adapted, totals = self._pair[1], reading.totals
        told, rate = "", getattr(adapted.rule, "lr", None)
        if adapted.rule.kind == "hand-made" and isinstance(rate, Tensor):
            rate.data.mul_(LOWER)
            told = f" with lr {float(rate):.3g}"
        adapted.hidden = static_hidden
        totals.restarts += 1
        if totals.restarts <= RESTARTS_TOLD:
            log.warning(
                f"reading with {adapted.rule.name} diverged after {totals.tokens:,} tokens; "
                f"it goes on from the trained weights{told}"
            )
