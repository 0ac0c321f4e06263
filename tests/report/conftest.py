"""A plausible finished evaluation, made in milliseconds, in the format that dynlm.evaluate.compare writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dynlm.runs import Json, Run, write_json, write_tensors

EDGES = (0, 32, 64, 128, 256)


class FakeRun(Run):
    """A run directory with an evaluation of ``methods`` on articles of random length."""

    def __init__(self, path: Path, methods: Sequence[str], articles: int, reset: str) -> None:
        super().__init__(path)
        random = torch.Generator().manual_seed(0)
        lengths = torch.randint(60, 256, (articles,), generator=random)
        self.article = torch.arange(articles).repeat_interleave(lengths).int()
        self.position = torch.cat([torch.arange(int(n)) for n in lengths]).int()
        static_T = torch.empty(len(self.article)).exponential_(0.2, generator=random)
        noise_T = torch.randn(len(self.article), generator=random)
        gain_T = (self.position / 60).log1p() + 0.2 * noise_T
        self.losses_by_method = {name: static_T - 0.1 * i * gain_T for i, name in enumerate(methods)}
        self.value: Json = {
            "schema": 1,
            "data": {
                "source": "wikitext-2",
                "split": "validation",
                "titles": [f"Title {i}" for i in range(articles)],
                "fingerprint": "sha256:4f1c9a77",
            },
            "reset": reset,
            "segment": 32,
            "model": {"class": "LSTM", "parameters": 1574912, "adapted": 1574912},
            "versions": {"torch": "2.13.0"},
            "articles": articles,
            "tokens": len(self.article),
            "words": int(0.8 * len(self.article)),
            "bytes": 4 * len(self.article),
            "methods": {name: self._method(name) for name in methods},
            "comparisons": [],
        }
        self.save()

    def save(self) -> None:
        """Write results and losses as they stand, after a test has changed them."""
        losses = {f"losses/{name}": loss for name, loss in self.losses_by_method.items()}
        write_tensors(self.losses, {**losses, "article": self.article, "position": self.position})
        write_json(self.results, self.value)

    def _method(self, name: str) -> Json:
        nats = float(self.losses_by_method[name].double().sum())
        tokens = len(self.article)
        gain_T = self.losses_by_method["static"] - self.losses_by_method[name]
        gain = float(gain_T.mean())
        bins = []
        for start, stop in pairwise(EDGES):
            inside = (self.position >= start) & (self.position < stop)
            if inside.any():
                here = float(gain_T[inside].mean())
                where = {"from": start, "to": stop, "tokens": int(inside.sum()), "articles": 1}
                bins.append({**where, "gain": here, "ci95": [here - 0.02, here + 0.02]})
        return {
            "nats": nats,
            "token_ppl": math.exp(nats / tokens),
            "word_ppl": math.exp(nats / int(0.8 * tokens)),
            "bits_per_byte": nats / (4 * tokens) / math.log(2),
            "gain_nats_per_token": gain,
            "gain_ci95": [gain - 0.01, gain + 0.01],
            "tokens_per_s": 4321.0,
            "gain_by_position": bins,
            "settings": {"lr": 0.0020000000949949026},
        }


MakeRun = Callable[..., FakeRun]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(methods: Sequence[str] = ("static", "sgd", "rms", "gated"), articles: int = 10, reset: str = "article"):
        return FakeRun(tmp_path / "run", methods, articles, reset)

    return make
