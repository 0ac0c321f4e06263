"""What ``dynlm read`` sums up, and how it is told: in lines for a person and as figures for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dynlm.files import Json
from dynlm.report.numbers import SANE_PERPLEXITY, likelier, plus, three
from dynlm.types import perplexity

FAR = math.log(10)
"""nats per token above the model's own validation text from which on a text is far from what it knows: each token is
ten times less likely. For the shipped model English prose stays below it, other languages and most code do not."""
FAR_TOKENS = 64
"""tokens of a text that is judged at the least"""
UNKNOWN_SHARE = 0.01
CLIPPED_SHARE = 0.02
"""of the updates, above which it is told"""
WORD_WIDTH = 20


@dataclass
class Totals:
    """Sums over all that was read."""

    articles: int = 0
    tokens: int = 0
    restarts: int = 0
    """times that reading diverged and went on from the trained weights"""
    updates: int = 0
    clipped: int = 0
    """updates whose gradient was scaled down to the trust region"""
    unknown_bytes: int = 0
    """bytes of characters or words that the tokenizer does not know"""
    words: int = 0
    """what stands between blanks, as ``wc -w`` counts"""
    lines: int = 0
    bytes: int = 0
    static: float = 0.0
    """nats"""
    adapted: float = 0.0
    """nats"""
    seconds: float = 0.0
    in_word: bool = False
    """the stretch that was counted last ends within a word"""

    @property
    def gain(self) -> float:
        """Nats a token."""
        return (self.static - self.adapted) / max(1, self.tokens)

    def perplexity(self, nats: float) -> float:
        """By word, an end of line counting as one, as everywhere in dynlm."""
        return perplexity(nats, self.words + self.lines)

    def bits(self, nats: float) -> float:
        """Bits per byte of the text."""
        return nats / math.log(2) / max(1, self.bytes)

    @property
    def sane(self) -> bool:
        """Whether perplexities by word are worth telling."""
        return max(self.perplexity(self.static), self.perplexity(self.adapted)) < SANE_PERPLEXITY

    def begin(self) -> None:
        """Begin a new text."""
        self.articles += 1
        self.in_word = False

    def count(self, text: str) -> None:
        """Count words, lines and bytes of a stretch, which may begin and end within a word."""
        if not text:
            return
        self.bytes += len(text.encode())
        self.lines += text.count("\n")
        self.words += len(text.split()) - (self.in_word and not text[0].isspace())
        self.in_word = not text[-1].isspace()

    def figures(self) -> Json:
        """The sums, and per reader nats per token, bits per byte and word perplexity (null beyond all numbers)."""
        figures: Json = {name: getattr(self, name) for name in COUNTS}
        for name, nats in (("static", self.static), ("adapted", self.adapted)):
            word = self.perplexity(nats)
            figures[name] = {
                "nats": nats,
                "nats_per_token": nats / max(1, self.tokens),
                "bits_per_byte": self.bits(nats),
                "word_perplexity": word if math.isfinite(word) else None,
            }
        return figures | {"gain_nats_per_token": self.gain}

    def told(self, rule: str) -> list[str]:
        """Return the totals for a person."""
        speed = three(self.tokens / max(self.seconds, 1e-9))
        counts = f"{self.words:,} words in {self.lines:,} line{'s' * (self.lines != 1)} ({self.bytes:,} bytes)"
        lines = [f"{counts}, {self.tokens:,} tokens, {self.seconds:.1f} s ({speed} tokens/s)"]
        width = max(8, len(rule))
        for name, nats in (("static", self.static), (rule, self.adapted)):
            per_token = nats / max(1, self.tokens)
            line = f"{name:>{width}} {three(self.bits(nats)):>6} bits per byte {three(per_token):>6} nats per token"
            lines.append(f"{line}  word perplexity {three(self.perplexity(nats)):>6}" if self.sane else line)
        return [*lines, f"{'gain':>{width}} {plus(self.gain)} nats per token: {likelier(self.gain)}"]

    def note(self, home: float | None) -> str:
        """Warn where the figures mislead; empty where they do not. ``home`` is static's nats per token at home."""
        parts = []
        if self.restarts:
            times = "once" if self.restarts == 1 else f"{self.restarts:,} times"
            parts.append(f"Reading diverged {times} and went on from the trained weights: what it had learned is gone")
        if self.clipped > CLIPPED_SHARE * self.updates:
            parts.append(
                f"{self.clipped:,} of {self.updates:,} updates were scaled down to the trust region: the text asks for "
                "larger steps than any of the kind that the model was trained on"
            )
        static, share = self.static / max(1, self.tokens), self.unknown_bytes / max(1, self.bytes)
        if home is not None and self.tokens >= FAR_TOKENS and static > home + FAR:
            parts.append(
                f"This text is far from what the model knows: static loses {three(static)} nats per token here, but "
                f"{three(home)} on text of the kind it was trained on. A large gain does not mean that it reads well"
            )
        if share >= UNKNOWN_SHARE:
            parts.append(
                f"The tokenizer does not know {three(100 * share)} % of the text (characters or words) and reads all "
                "of that as one token: a gain on it means nothing"
            )
        return ". ".join(parts)


COUNTS = ("articles", "tokens", "restarts", "updates", "clipped", "unknown_bytes", "words", "lines", "bytes", "seconds")


def word_lines(rows: Sequence[Json], mean: Json | None, rule: str) -> list[str]:
    """Return the table of words that came again, aligned; nothing where there are none."""
    if not rows:
        return []
    shown = [(_cut(row["word"]), f"{row['times']:,}", row) for row in rows]
    if mean and mean["words"] > len(rows):
        shown.append((f"mean of {mean['words']:,} words", "", mean))
    width = max(len(name) for name, *_ in shown)
    lines = [
        f"words that static expected least and that came again: nats, static → {rule}",
        f"{'':>{width}} {'times':>6}  {'1st':>13}  {'2nd':>13}  {'3rd':>13}",
    ]
    for name, times, row in shown:
        pairs = (f"{s:5.1f} → {a:5.1f}" for s, a in zip(row["static"], row["adapted"], strict=True))
        lines.append(f"{name:>{width}} {times:>6}  {'  '.join(pairs)}")
    return lines


def _cut(word: str) -> str:
    return word if len(word) <= WORD_WIDTH else f"{word[: WORD_WIDTH - 1]}…"
