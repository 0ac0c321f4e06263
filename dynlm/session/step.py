"""One segment as it was read: the observation point of reading."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor

from dynlm.inner import InnerLoop, Scored
from dynlm.session.totals import Totals
from dynlm.types import InputError, Piece


class Step:
    """One segment of S tokens, scored under the weights before it; the update follows when the loop goes on.

    Attributes:
        texts: the stretch of the text that each token stands for.
        inputs: (S,) token ids, each the token before its target.
        targets: (S,) token ids.
        losses: (S,) nats of the targets under the weights that reading has reached.
        static: (S,) nats of the targets under the trained weights.
    """

    def __init__(
        self,
        texts: list[str],
        piece: Piece,
        static_S: Tensor,
        scored: Scored,
        *,
        reader: InnerLoop,
        totals: Totals,
    ) -> None:
        self.texts, self.static, self.losses = texts, static_S.double().cpu(), scored.losses_S.double().cpu()
        self.inputs, self.targets = piece
        self._scored: Scored | None = scored
        self._reader, self._log_probs, self._totals = reader, scored.log_probs, totals

    def __repr__(self) -> str:
        gain = float((self.static - self.losses).mean())
        return f"Step({len(self.texts)} tokens, {float(self.losses.mean()):.3f} nats per token, gain {gain:+.3f})"

    def log_probs(self) -> Tensor:
        """Return (S, V): the logarithms of the distributions that the losses were taken from.

        Raises:
            InputError: a model that shows no logits.
        """
        assert self._log_probs is not None  # a reader of texts taps the model
        with torch.no_grad():
            return self._log_probs()

    @property
    def before(self) -> dict[str, Tensor]:
        """A copy of the adapted weights by name, as they scored this segment; to be asked for before ``after``.

        Raises:
            InputError: the update was made.
        """
        if self._scored is None:
            raise InputError("the weights of this step were updated already: ask for `before` before `after`")
        return self._weights()

    @property
    def after(self) -> dict[str, Tensor]:
        """A copy of the adapted weights by name, after the update that this segment makes."""
        self.update()
        return self._weights()

    def update(self) -> None:
        """Learn from this segment now; the loop does it otherwise when it goes on or ends."""
        scored, self._scored = self._scored, None
        if scored is None:
            return
        started, reader, totals = perf_counter(), self._reader, self._totals
        clipped = reader.clipped
        reader.learn(scored)
        totals.updates += reader.rule.reads_gradient
        totals.clipped += reader.clipped - clipped
        totals.seconds += perf_counter() - started

    def _weights(self) -> dict[str, Tensor]:
        return {a.name: a.parameter.detach().clone() for a in self._reader.adapted}
