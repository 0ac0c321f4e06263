"""Names of methods: a rule, the seed it was meta-trained with, the learned start it reads from, a cache or none.

    gated    gated#1        gated@fomaml         gated#1@fomaml+cache             cache    in settings and results
    gated    gated-seed1    gated-from-fomaml    gated-seed1-from-fomaml-cache    cache    in file names

``cache`` is ``static`` with a cache. Files of earlier versions are spelled as settings are, and are still read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated

from dynlm.settings import Form, shown
from dynlm.types import InputError

STATIC, STATELESS, CACHE = "static", "stateless", "cache"
SUFFIX = ".safetensors"
RULE = r"\w(?:(?!-seed\d|-from-|-cache\b)[\w.-])*"
NAME = re.compile(rf"({RULE})(?:(?:#|-seed)(\d+))?(?:(?:@|-from-)(\w+))?([+-]{CACHE})?")
RuleName = Annotated[str, Form(rf"{RULE}(#\d+)?", "a rule, as gated or gated#1")]
MethodName = Annotated[
    str, Form(rf"{RULE}(#\d+)?(@\w+)?(\+cache)?", "a method, as gated, gated#1, gated@fomaml, cache or gated+cache")
]


@dataclass(frozen=True)
class Method:
    """A way to read. ``str`` gives its name in settings and results, ``stem`` that of its file without the end."""

    rule: str
    seed: int = 0
    start: str = ""
    """the method of ``learn-start`` that learned its θ0; empty: the base model's"""
    cache: bool = False

    @classmethod
    def find(cls, name: str) -> Method | None:
        """Read the name of a method or of its file; None if it is neither."""
        if name.removesuffix(SUFFIX) == CACHE:
            return cls(STATIC, cache=True)
        match = NAME.fullmatch(name.removesuffix(SUFFIX))
        if match is None or match[1] == CACHE:
            return None
        return cls(match[1], int(match[2] or 0), match[3] or "", match[4] is not None)

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
        if self == Method(STATIC, cache=True):
            return CACHE
        parts = ((seed, self.seed), (start, self.start), (cache, CACHE if self.cache else ""))
        return self.rule + "".join(f"{mark}{part}" for mark, part in parts if part)

    @property
    def uncached(self) -> Method:
        """The method beside which the cache stands."""
        return replace(self, cache=False)
