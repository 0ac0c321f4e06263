"""What ``dynlm read`` keeps of what it reads, and how the page, the memory and the JSON object are written from it.

On streams memory stays flat: tokens are kept for the page and the JSON object only, and of words a bounded table.
"""

from __future__ import annotations

import json
import sys
from array import array
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch

import dynlm
from dynlm.cli.kit import Kit
from dynlm.cli.memory import save_memory
from dynlm.cli.pair import Pair, Scored
from dynlm.cli.targets import Target
from dynlm.cli.terminal import printable, tell
from dynlm.cli.totals import Totals
from dynlm.report.words import Occurrences
from dynlm.runs import Json

if TYPE_CHECKING:
    from dynlm.cli.read import ReadSettings

SCHEMA = 1
WORDS = 20
"""rows of the table of words; a terminal shows the first of them"""


@dataclass
class Record:
    """Every token of all texts."""

    texts: list[str] = field(default_factory=list)
    static: array[float] = field(default_factory=lambda: array("f"))
    adapted: array[float] = field(default_factory=lambda: array("f"))
    articles: list[tuple[str, int]] = field(default_factory=list)
    """(title, number of its first token)"""


class Outcome:
    """All that was read so far. ``words`` and ``record`` are None where nobody asked for them."""

    def __init__(self, settings: ReadSettings, kit: Kit) -> None:
        self.settings, self.kit, self.totals = settings, kit, Totals()
        wants_tokens = bool(settings.html or settings.json)
        self.record = Record() if wants_tokens else None
        self.words = Occurrences(WORDS) if wants_tokens or not settings.quiet else None

    def begin(self, title: str) -> None:
        """A new text."""
        if self.words and self.settings.resets == "article":
            self.words.end_text()
        if self.record:
            self.record.articles.append((printable(title), len(self.record.texts)))

    def add(self, scored: Scored) -> None:
        """One segment of it."""
        if self.words:
            self.words.add(*scored)
        if self.record:
            self.record.texts += scored.texts
            self.record.static.extend(scored.static)
            self.record.adapted.extend(scored.adapted)

    def end(self) -> None:
        """Nothing more will be read."""
        if self.words:
            self.words.end_text()

    def note(self) -> str:
        """A warning where the figures mislead, or nothing."""
        return self.totals.note(self.kit.home)

    def write_memory(self, target: Target, pair: Pair) -> None:
        """What reading changed in the model.

        Raises:
            InputError: weights that the last update left not finite.
        """
        with target.writing() as path:
            save_memory(path, pair.static, pair.adapted, self.kit.memory_of())
        tell(f"memory: {target.name} ({target.megabytes()})")

    def write_page(self, target: Target) -> None:
        """Every token, on one page."""
        from dynlm.report.tokenmap import TokenMap, write_token_map  # matplotlib, which takes a second

        record, words = self.record, self.words
        if not record or not words or not record.texts:
            return
        losses = record.static, record.adapted
        shown = TokenMap(
            self.kit.rule.name,
            record.articles,
            record.texts,
            *losses,
            self.totals.figures(),
            self._provenance(),
            words=words.rows(),
            mean=words.mean(),
            limit=words.limit,
            note=self.note(),
        )
        with target.writing() as path:
            write_token_map(path, shown)
        tell(f"page: {target.name} ({target.megabytes()})")

    def print_json(self, stopped_by: str) -> None:
        """One object on standard output."""
        record, words = self.record, self.words
        if not record or not words:
            return
        starts = [start for _, start in record.articles]
        value: Json = {
            "schema": SCHEMA,
            "stopped_by": stopped_by or None,
            "rule": self.kit.rule.name,
            "settings": asdict(self.settings),
            "provenance": self._provenance(),
            "totals": self.totals.figures(),
            "note": self.note() or None,
            "words": words.rows(),
            "words_mean": words.mean(),
            "words_limit": words.limit or None,
            "articles": [
                {"title": title, "first_token": start, "tokens": stop - start}
                for (title, start), stop in zip(record.articles, [*starts[1:], len(record.texts)], strict=True)
            ],
            "tokens": {
                "text": record.texts,
                "static": [round(nats, 6) for nats in record.static],
                "adapted": [round(nats, 6) for nats in record.adapted],
            },
        }
        json.dump(value, sys.stdout, allow_nan=False)
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _provenance(self) -> Json:
        kit, settings = self.kit, self.settings
        told: Json = {
            "model": kit.source,
            "adapted weights": sum(p.theta0.numel() for p in kit.priors),
            **{f"fingerprint of the {name}": value for name, value in kit.fingerprints().items()},
            "tokens between updates": kit.config.segment,
            "weights reset": "never" if settings.resets == "never" else "at each article",
            "read on from": settings.load_memory or "the trained weights",
            "dynlm": dynlm.__version__,
            "torch": torch.__version__,
        }
        return told | {f"rule: {name}": value for name, value in kit.rule.settings().items()}
