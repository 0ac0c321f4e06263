"""Reading without short-term memory: nothing of an article is carried from one segment to the next.

What the model knows of a segment by itself: under ``static`` the gap to static reading is what its hidden state gives,
to hold against what reading with updates gives.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dynlm.inner import Scorer


class StatelessScorer:
    """``score``, from an empty hidden state at every segment: an LSTM's state, keys and values, or the tokens before.

    The token before the segment's first is still seen: it is an input of the segment.
    """

    def __init__(self, score: Scorer) -> None:
        self.score = score

    def __call__(self, inputs_S: Tensor, targets_S: Tensor, hidden: Any) -> tuple[Tensor, None]:
        losses_S, _ = self.score(inputs_S, targets_S, None)
        return losses_S, None
