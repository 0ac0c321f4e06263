"""THE inner loop, shared by evaluation and meta-training: score, gradient, update, carry.

A segment's tokens are scored under θ_t before the update that sees them; the hidden state is carried, detached. At an
article's start θ ← θ0, s ← 0, h ← 0 (reset ``article``), or everything goes on (reset ``never``).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Self, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dynlm.allocator import keep_freed_memory
from dynlm.data.segments import article_segments
from dynlm.models.params import adapted_parameters, as_matrix
from dynlm.models.tap import Tap
from dynlm.optim.base import Prior, Rule, RuleState, Seen
from dynlm.optim.kernel import InPlaceUpdate
from dynlm.settings import Count, NotEmpty, NotNegative, Settings
from dynlm.types import DivergedError, InputError, TokenizedArticle

UpdateStep = Callable[[Sequence[Tensor], Sequence[Tensor], RuleState, Sequence[Prior]], Seen]
"""(thetas, grads, state, priors): changes weights and state in place and returns what the rule observed"""


class Scorer(Protocol):
    """A base model as the inner loop sees it: losses of one segment under its present weights."""

    def __call__(self, inputs_S: Tensor, targets_S: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        """Return (losses_S in nats, hidden state after the segment)."""


@dataclass(frozen=True)
class ReadConfig(Settings):
    """How an article is read."""

    segment: Count = 32
    """tokens scored between two updates"""
    reset: Literal["article", "never"] = "article"
    """article: weights, optimizer state and hidden state start anew at each article; never: one stream"""
    params: Annotated[tuple[str, ...], NotEmpty()] = ("*",)
    """globs on names of the adapted parameters; tied tensors count once"""
    kernel: Literal["auto", "compiled", "eager"] = "auto"
    """auto compiles the update step where a C compiler is present"""
    trust: NotNegative = 3.0
    """trust region: a tensor's gradient is scaled down to at most this many times its usual norm; 0: as it is"""


class Update(NamedTuple):
    """What a segment's update was made of: no ``grads`` and nothing ``seen`` where nothing was learned from it.

    ``grads`` are those that the rule saw, inside the trust region.
    """

    losses_S: Tensor
    grads: list[Tensor]
    seen: Seen | None


class Scored(NamedTuple):
    """One segment as it was scored, before the update: what there is to observe."""

    inputs_S: Tensor
    targets_S: Tensor
    losses_S: Tensor
    value: float
    """the mean of the model's own losses"""
    mean: Tensor | None
    """the same with its graph; None where nothing will be learned from it"""
    log_probs: Callable[[], Tensor] | None = None
    """makes the (S, V) distributions that the losses were taken from, a cache's share included, where the loop taps the
    model; raises InputError for a model that shows no logits"""


class Observer:
    """Looks on while a loop reads: override what you want to see. Scores and updates must not change by it."""

    def scored(self, scored: Scored) -> None:
        """See a segment while the weights and the state that scored it still stand."""

    def learned(self, update: Update) -> None:
        """See the update that followed; segments that nothing is learned from have none."""


class Snapshot(NamedTuple):
    """A reader's whole position: fast weights, rule state, hidden state."""

    thetas: list[Tensor]
    state: RuleState
    """the rule's, from :meth:`begin` on"""
    hidden: Any


_LEASES: WeakKeyDictionary[nn.Module, InnerLoop] = WeakKeyDictionary()
"""who reads with a model, inside its context"""


class InnerLoop:
    """Read with a model and a rule: a context manager that puts θ0 back bit for bit, also after an exception.

    Inside the context the model's weights are this loop's: another one on the same model is refused until it ends.
    Entering it begins; making a loop does no work and leaves the model alone.
    """

    taps = False
    """whether each segment's distributions and hidden states are wanted even where nobody observes"""
    state: RuleState

    def __init__(
        self, model: nn.Module, score: Scorer, rule: Rule, priors: Sequence[Prior], config: ReadConfig | None = None
    ) -> None:
        self.config = config = config or ReadConfig()
        self.model, self.score, self.rule, self.priors = model, score, rule, priors
        self.adapted = adapted_parameters(model, config.params)
        if [a.name for a in self.adapted] != [p.name for p in priors]:
            raise InputError(
                f"the prior belongs to other parameters than those of {config.params}: measure it again",
                setting="read.params",
            )
        self.parameters = [a.parameter for a in self.adapted]
        self.thetas = [a.matrix_RC for a in self.adapted]
        self.apply: UpdateStep = InPlaceUpdate(rule, {"auto": None, "compiled": True, "eager": False}[config.kernel])
        self.largest, self.clipped = largest_norms(priors, config.trust), 0
        """updates so far whose gradient left the trust region"""
        self.learns = rule.reads_gradient
        """whether reading updates the weights; False scores alone"""
        self.hidden: Any = None
        self.observers: list[Observer] = []
        self.observing = 0.0
        """seconds that observers took: no part of reading"""

    @classmethod
    def of(cls, loop: InnerLoop) -> Self:
        """Return a loop of this kind with all that ``loop`` was made of."""
        return cls(loop.model, loop.score, loop.rule, loop.priors, loop.config)

    def __enter__(self) -> Self:
        self.begin()
        _LEASES[self.model] = self
        self._was_training = self.model.training
        self.model.eval()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
        self.model.train(self._was_training)
        _LEASES.pop(self.model, None)

    def restore(self) -> None:
        """θ ← θ0, bit for bit."""
        with torch.no_grad():
            for theta, prior in zip(self.thetas, self.priors, strict=True):
                theta.copy_(prior.theta0)

    def begin(self) -> None:
        """Start again: θ ← θ0, s ← 0, h ← 0.

        Raises:
            InputError: another loop reads with this model.
        """
        if (other := _LEASES.get(self.model)) not in (None, self):
            rule = other.rule.name if other else ""
            raise InputError(
                f"a reader with rule {rule!r} reads with this model: leave its `with` first, or read with a copy of it"
            )
        keep_freed_memory()
        self.restore()
        self.state = self.rule.init(self.priors)
        self.hidden = None

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """Inside, show ``observer`` every segment as it is scored, and every update."""
        self.observers.append(observer)
        try:
            yield
        finally:
            self.observers.remove(observer)

    def snapshot(self) -> Snapshot:
        """Return a copy of the position, to read something else in between."""
        return Snapshot([theta.clone() for theta in self.thetas], copy.deepcopy(self.state), self.carried())

    def resume(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, which must not be used again."""
        with torch.no_grad():
            for theta, saved in zip(self.thetas, snapshot.thetas, strict=True):
                theta.copy_(saved)
        self.state = snapshot.state
        self.carry(snapshot.hidden)

    def carried(self) -> Any:
        """Return what goes from segment to segment beside weights and rule state: the hidden state."""
        return self.hidden

    def carry(self, carried: Any) -> None:
        """Go on with what :meth:`carried` returned."""
        self.hidden = carried

    def segment(self, inputs_S: Tensor, targets_S: Tensor, last: bool = False) -> Update:
        """Score, then update. ``last`` spares the update that no later token would see.

        Raises:
            DivergedError: a loss that is not finite; the weights are θ0 again.
        """
        return self.learn(self.scored(inputs_S, targets_S, last))

    def scored(self, inputs_S: Tensor, targets_S: Tensor, last: bool = False) -> Scored:
        """The first half of :meth:`segment`: the losses under the present weights, and what :meth:`learn` needs."""
        if "state" not in vars(self):
            raise InputError("this loop has not begun: read inside `with loop:`, or call `loop.begin()` first")
        with Tap(self.model) if self.taps or self.observers else nullcontext() as tap:
            scored = self._scored(inputs_S, targets_S, learns=self.learns and not last)
        if tap is not None:
            with torch.no_grad():
                scored = self.tapped(scored, tap)
        self._show(lambda observer: observer.scored(scored))
        return scored

    def tapped(self, scored: Scored, tap: Tap) -> Scored:
        """Return what a segment's scores become; here the model's own. ``mean`` stays the model's own in any case."""
        size = scored.losses_S.numel()
        return scored._replace(log_probs=lambda: tap.logits(size).log_softmax(1))

    @torch.no_grad()
    def _show(self, show: Callable[[Observer], None]) -> None:
        if self.observers:
            started = time.perf_counter()
            for observer in self.observers:
                show(observer)
            self.observing += time.perf_counter() - started

    def _scored(self, inputs_S: Tensor, targets_S: Tensor, learns: bool) -> Scored:
        with torch.set_grad_enabled(learns):
            losses_S, hidden = self.score(inputs_S, targets_S, self.hidden)
            mean = losses_S.mean()
        self.hidden = detach(hidden)
        value = mean.item()
        if not math.isfinite(value):
            step = self.state.clock.step
            self.begin()
            raise DivergedError(_not_finite(value, step, self.rule))
        return Scored(inputs_S, targets_S, losses_S.detach(), value, mean if learns else None)

    def learn(self, scored: Scored) -> Update:
        """Update by the gradient of a segment's mean loss, where that is to be: the second half of :meth:`segment`."""
        if scored.mean is None:
            return Update(scored.losses_S, [], None)
        grads = self.gradient(scored.mean)
        self.state.clock.tick(scored.value)
        seen = self.apply(self.thetas, grads, self.state, self.priors)
        update = Update(scored.losses_S, grads, seen)
        self._show(lambda observer: observer.learned(update))
        return update

    def gradient(self, mean_loss: Tensor) -> list[Tensor]:
        """∇θ of a mean segment loss as (R, C) matrices, inside the trust region; 0 for parameters it does not reach."""
        grads = torch.autograd.grad(mean_loss, self.parameters, materialize_grads=True)
        matrices = [as_matrix(g.contiguous()) for g in grads]  # of a convolution it may be channels-last
        within, clipped = within_trust(matrices, self.largest)
        self.clipped += clipped
        return within

    def read(self, article: TokenizedArticle, start_id: int, progress: Callable[[int], Any] | None = None) -> Tensor:
        """Losses of one article (T,), in nats, each token scored before any update that saw it.

        Raises:
            InputError: an empty article, a scorer whose losses are not one for each target.
            DivergedError: a loss that is not finite.
        """
        if len(article) == 0:
            raise InputError(f"article {article.id!r} is empty: nothing to read")
        if self.config.reset == "article":
            self.begin()
        device = self.parameters[0].device
        pieces = list(article_segments(article.ids_T.to(device), start_id, self.config.segment))
        losses_T, done = None, 0
        for number, (inputs_S, targets_S) in enumerate(pieces, 1):
            last = number == len(pieces) and self.config.reset == "article"
            losses_S = _each(self.segment(inputs_S, targets_S, last).losses_S, targets_S)
            if losses_T is None:  # one vector: a small one kept of each segment breaks up the memory that logits leave
                losses_T = losses_S.new_empty(len(article))
            losses_T[done : done + len(losses_S)] = losses_S
            done += len(losses_S)
            if progress:
                progress(targets_S.numel())
        return cast(Tensor, losses_T)


def largest_norms(priors: Sequence[Prior], trust: float) -> list[float]:
    """The trust region: of each tensor's gradient, ``trust`` times the norm of its static RMS. None where that is 0."""
    return [trust * float(torch.linalg.vector_norm(prior.rms)) for prior in priors] if trust else []


def within_trust(grads: Sequence[Tensor], most: Sequence[float]) -> tuple[list[Tensor], bool]:
    """Scale down each gradient whose norm is above ``most``, its largest; also says whether any was.

    A gradient larger than any of the model's own kind of text comes of text that is far from it, and would carry every
    rule further than it was made for. Differentiable; the meta-gradient engines see the loss's slope as the rule does.
    """
    if not most:
        return list(grads), False
    norms = [torch.linalg.vector_norm(grad) for grad in grads]
    within, clipped = list(grads), False
    for i, (largest, norm) in enumerate(zip(most, torch.stack(norms).tolist(), strict=True)):
        if norm > largest:
            within[i], clipped = grads[i] * (largest / norms[i]), True
    return within, clipped


def _each(losses_S: Tensor, targets_S: Tensor) -> Tensor:
    if losses_S.shape != targets_S.shape:
        raise InputError(
            f"the scorer gave losses of shape {tuple(losses_S.shape)} for targets of shape {tuple(targets_S.shape)}: "
            "it must give each target its loss in nats"
        )
    return losses_S


def _not_finite(loss: float, step: int, rule: Rule) -> str:
    if step == 0:  # θ0 as it was trained
        return f"the loss is {loss} before any update: the model's weights or the text are broken, whatever the rule"
    lower = ": lower its lr" if "lr" in rule.settings() else ""
    return f"the loss is {loss} at segment {step}, after {step} update{'s' * (step > 1)} by rule {rule.name!r}{lower}"


def detach(hidden: Any) -> Any:
    """Hidden states (nested tuples and lists of tensors) without their graph."""
    if isinstance(hidden, Tensor):
        return hidden.detach()
    if isinstance(hidden, tuple | list):
        return type(hidden)(detach(h) for h in hidden)
    return hidden
