"""A plausible finished evaluation, made in milliseconds, in the format that dynlm.evaluation.compare writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from dynlm.files import Json, write_json, write_tensors
from dynlm.methods import Method
from dynlm.runs import Run

EDGES = (0, 32, 64, 128, 256)
WORDS = ("a ", "text ", "<unk> ", "& ", '"signs" ', "</script> ", "\n", "", "日")


def pieces(ids: Sequence[int]) -> list[str]:
    """A tokenizer's, for the tokens of :class:`FakeRun`."""
    return [WORDS[i] for i in ids]


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
        self.ids = torch.randint(len(WORDS), self.article.shape, generator=random).int()
        updates = [int(n) // 32 for n in lengths[:3]]
        self.gates = {n: torch.rand(3, sum(updates), 2, generator=random) for n in methods if n in ("rms", "gated")}
        self.value: Json = {
            "schema": 2,
            "data": {
                "source": "wikitext-2",
                "split": "validation",
                "titles": [f"Title {i}" for i in range(articles)],
                "fingerprint": "sha256:4f1c9a77",
            },
            "reset": reset,
            "segment": 32,
            "model": {"class": "LSTM", "parameters": 1574912, "adapted": 1574912, "fingerprint": "sha256:0b5e"},
            "versions": {"torch": "2.13.0"},
            "articles": articles,
            "tokens": len(self.article),
            "words": int(0.8 * len(self.article)),
            "bytes": 4 * len(self.article),
            "methods": {name: self._method(name) for name in methods},
            "comparisons": [],
            "breakdowns": self._breakdowns(methods, updates, reset),
        }
        self.save()

    def save(self) -> None:
        """Write results and losses as they stand, after a test has changed them."""
        losses = {f"losses/{name}": loss for name, loss in self.losses_by_method.items()}
        gates = {f"gates/{name}": values for name, values in self.gates.items()}
        places = {"article": self.article, "position": self.position, "ids": self.ids}
        write_tensors(self.losses, {**losses, **gates, **places})
        write_json(self.results, self.value)

    def _breakdowns(self, methods: Sequence[str], updates: list[int], reset: str) -> Json:
        others = [name for name in methods if name != "static"]

        def rows(*labels: str) -> list[Json]:
            gain = {name: {"mean": 0.1 * i, "ci95": [0.1 * i - 0.05, 0.1 * i + 0.05]} for i, name in enumerate(others)}
            return [{"bin": label, "tokens": 100, "articles": 2, "static": 4.0, "gain": gain} for label in labels]

        means = {"copy": [0.999, 1.0], "update": [1e-3, 2e-3], "flush": [1e-4, 0.0]}
        gates = {"tensors": ["embedding", "layer"], "weights": [4096, 128], "segments": updates, "mean": means}
        bins = [
            {"from": 0.1 * k, "to": 0.1, "tokens": 9, "confidence": 0.1 * k, "accuracy": 0.09 * k} for k in range(9)
        ]
        breakdowns: Json = {
            "relative_position": rows(*(f"{10 * k}-{10 * k + 10} %" for k in range(10))),
            "occurrence": rows("first", "later"),
            "vocabulary": rows("names", "numbers", "others"),
            "train_frequency": rows("0", "1-9"),
            "calibration": {name: {"ece": 0.02, "ci95": [0.01, 0.03], "bins": bins} for name in methods},
            "gates": dict.fromkeys(self.gates, gates),
        }
        if reset == "never":
            segments = [{"segment": k + 1, **rows("x")[0]} for k in range(8)]
            recovery = {name: {"mean": 3.0, "ci95": [2.0, 4.0]} for name in methods}
            breakdowns["boundaries"] = {"segments": segments, "recovery_segments": recovery}
            again = {name: {"first_reading": 4.0, "again": 3.5, "gain": 0.5, "ci95": [0.4, 0.6]} for name in others}
            breakdowns["interference"] = {"article": "Title 0", "segments": 3, "static": 4.0, "methods": again}
        return breakdowns

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
        method = Method.find(name) or Method(name)
        kinds = {"static": "baseline", "stateless": "baseline", "sgd": "hand-made", "rms": "hand-made"}
        kind = {**kinds, "adam": "hand-made"}.get(method.rule, "learned")
        return {
            "rule": method.rule,
            "kind": "hand-made" if method.cache and kind == "baseline" else kind,
            "seed": method.seed,
            "start": method.start or None,
            "cache": method.cache,
            "fingerprint": None if kind == "baseline" else f"{method.rule}-0b5e",
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
