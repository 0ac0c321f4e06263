"""Names of methods: a rule, its seed of meta-training, the learned start it reads from, a cache, a mixture.

    gated    gated#1        gated@fomaml         gated#1@fomaml+cache             cache    gated+mix    in settings
    gated    gated-seed1    gated-from-fomaml    gated-seed1-from-fomaml-cache    cache    gated-mix    in file names

``cache`` is ``static`` with a cache; ``gated+cache+mix`` mixes static, adapted and cache predictions by a learned
network. Files of earlier versions are spelled as settings are, and are still read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated

from dynlm.settings import Form, shown
from dynlm.types import InputError

STATIC, STATELESS, CACHE, MIX = "static", "stateless", "cache", "mix"
SUFFIX = ".safetensors"
RULE = r"\w(?:(?!-seed\d|-from-|-cache\b|-mix\b)[\w.-])*"
NAME = re.compile(rf"({RULE})(?:(?:#|-seed)(\d+))?(?:(?:@|-from-)(\w+))?([+-]{CACHE})?([+-]{MIX})?")
RuleName = Annotated[str, Form(rf"{RULE}(#\d+)?", "a rule, as gated or gated#1")]
MethodName = Annotated[
    str,
    Form(
        rf"{RULE}(#\d+)?(@\w+)?(\+cache)?(\+mix)?",
        "a method, as gated, gated#1, gated@fomaml, cache, gated+cache or gated+cache+mix",
    ),
]


@dataclass(frozen=True)
class Method:
    """A way to read. ``str`` gives its name in settings and results, ``stem`` that of its file without the end."""

    rule: str
    seed: int = 0
    start: str = ""
    """the method of ``learn-start`` that learned its θ0; empty: the base model's"""
    cache: bool = False
    mix: bool = False
    """static, adapted and cache predictions, weighted by a learned network"""

    @classmethod
    def find(cls, name: str) -> Method | None:
        """Read the name of a method or of its file; None if it is neither."""
        match = NAME.fullmatch(name.removesuffix(SUFFIX))
        if match is None:
            return None
        rule, cache, mix = match[1], match[4] is not None, match[5] is not None
        if rule == CACHE:
            return None if match[2] or match[3] or cache else cls(STATIC, cache=True, mix=mix)
        return cls(rule, int(match[2] or 0), match[3] or "", cache, mix)

    @classmethod
    def parse(cls, name: str) -> Method:
        """Read the name of a method or of its file.

        Raises:
            InputError: a name of another form.
        """
        method = cls.find(name)
        if method is None:
            raise InputError(f"{shown(name)} is no method: write it as gated, gated#1, gated@fomaml or gated+cache")
        return method

    def __str__(self) -> str:
        return self._spelled("#", "@", "+")

    @property
    def stem(self) -> str:
        return self._spelled("-seed", "-from-", "-")

    def _spelled(self, seed: str, start: str, cache: str) -> str:
        parts = [(seed, self.seed), (start, self.start), (cache, CACHE if self.cache else "")]
        name = self.rule + "".join(f"{mark}{part}" for mark, part in parts if part)
        name = CACHE if replace(self, mix=False) == Method(STATIC, cache=True) else name
        return f"{name}{cache}{MIX}" if self.mix else name

    @property
    def beside(self) -> bool:
        """Whether a cache or a mixture stands beside the rule."""
        return self.cache or self.mix

    @property
    def alone(self) -> Method:
        """The method without either."""
        return replace(self, cache=False, mix=False)

    @property
    def inner(self) -> Method:
        """The method without its mixture, or else without its cache."""
        return replace(self, mix=False) if self.mix else replace(self, cache=False)
