"""Names of rules and methods, as settings and files hold them: never a path, always of one form."""

from __future__ import annotations

from typing import Annotated

from dynlm.settings import Form

RULE = r"\w[\w.-]*(#\d+)?"
RuleName = Annotated[str, Form(RULE, "a rule, as gated or gated#1")]
MethodName = Annotated[
    str, Form(RULE + r"(@\w+)?(\+cache)?", "a method, as gated, gated#1, gated@fomaml, cache or gated+cache")
]
