"""A model that learns while it reads, as lm-eval evaluates it: ``python -m dynlm.lm_eval --model dynlm --tasks ...``.

The arguments are lm-eval's own, and its other models are there too: ``--model hf`` knows what ``dynlm train`` wrote.
``--model_args run=DIR,rule=rms``: a run directory, or the shipped model without one, and one of its rules. ``static``
gives what ``hf`` gives where its ``max_length`` is above every document's. Every document is read from θ0, each token
scored before any update that saw it: a whole text, a context and its continuation, the context of what is written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from dynlm.data.segments import article_segments
from dynlm.inner import Observer, Scored
from dynlm.models.tap import Tap
from dynlm.progress import Bar
from dynlm.session.session import load_session
from dynlm.types import InputError, TokenizedArticle

try:
    import lm_eval.models  # noqa: F401  (its own models, which it names only where no other one is known)
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    raise InputError(f"lm-eval cannot be imported ({error}): pip install dynlm[lm-eval]") from None

Answer = TypeVar("Answer")
Request = tuple[tuple[str, str], list[int], list[int]]
"""((context, continuation), their tokens)"""


@register_model("dynlm")
class DynamicLM(TemplateLM):  # type: ignore[misc]
    """A base model with a rule that changes its weights while a document is read.

    Documents are read one by one, on the CPU: what lm-eval itself says of batches and devices changes nothing.

    Raises:
        InputError: no finished run, a rule that it does not hold, generation that draws.
        DivergedError: a document on which the rule diverges.
    """

    def __init__(
        self, run: str = "", rule: str = "", *, device: Any = None, batch_size: Any = None, max_batch_size: Any = None
    ) -> None:
        super().__init__()
        session = load_session(run)
        self.reader = session.reader(session.rule(rule).requires_grad_(False))
        self.start_id, self.tokenizer = session.tokenizer.start_id, session.tokenizer.pretrained()

    @property
    def eot_token_id(self) -> int | None:
        return cast("int | None", self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return self.start_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text as it stands, without special ones."""
        return cast(list[int], self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        def whole(request: Any) -> float:
            return -float(self._read([self.start_id, *self.tok_encode(request.args[0])]).sum())

        return self._answers(requests, whole)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return self._answers(requests, lambda request: self._continued(*request[1:]))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return self._answers(requests, lambda request: self._written(*request.args))

    def _answers(self, requests: Sequence[Any], answer: Callable[[Any], Answer]) -> list[Answer]:
        with self.reader, Bar(len(requests), "lm-eval", "document") as bar:
            return [answer(request) for request in bar.over(requests)]

    def _read(self, ids: Sequence[int]) -> Tensor:
        """Losses, in nats, of all tokens but the first, which is only read."""
        if len(ids) < 2:
            return torch.zeros(0, dtype=torch.double)
        return self.reader.read(_article(ids[1:]), ids[0]).double()

    def _continued(self, before: list[int], after: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of a continuation, and whether each of its tokens was the likeliest."""
        if not after:
            return 0.0, True
        with self.reader.observed_by(likeliest := _Likeliest()):
            losses_T = self._read(before + after)
        return -float(losses_T[-len(after) :].sum()), bool(torch.cat(likeliest.found)[-len(after) :].all())

    @torch.no_grad()
    def _written(self, context: str, wish: dict[str, Any]) -> str:
        """The likeliest text after ``context``, under the weights that reading it left, until ``wish`` ends it."""
        if wish.get("do_sample") and wish.get("temperature") != 0:
            raise InputError("this model writes the likeliest text: set do_sample to false in gen_kwargs")
        until = wish.get("until") or []
        ends = [end for end in ([until] if isinstance(until, str) else until) if end]
        start, *ids = self.tok_encode(context) or [self.start_id]
        reader, written, text = self.reader, list[int](), ""
        reader.begin()
        for inputs_S, targets_S in article_segments(_article(ids).ids_T, start, reader.config.segment) if ids else ():
            reader.segment(inputs_S, targets_S)
        token, hidden = torch.tensor([ids[-1] if ids else start]), reader.hidden
        while len(written) < wish.get("max_gen_toks", 256) and not any(end in text for end in ends):
            with Tap(reader.model) as tap:
                _, hidden = reader.score(token, token, hidden)
            token = tap.logits(1).argmax(1)
            if int(token) == self.eot_token_id:
                break
            written.append(int(token))
            text = cast(str, self.tokenizer.decode(written))
        return min((text.partition(end)[0] for end in ends), key=len, default=text)


class _Likeliest(Observer):
    """Whether each token of what is read was the likeliest."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def scored(self, scored: Scored) -> None:
        assert scored.log_probs is not None  # an observed loop taps the model
        self.found.append(scored.log_probs().argmax(1) == scored.targets_S)


def _article(ids: Sequence[int]) -> TokenizedArticle:
    return TokenizedArticle("document", "", torch.tensor(ids), 0, 0)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as error:
        sys.exit(f"dynlm: {error}")
