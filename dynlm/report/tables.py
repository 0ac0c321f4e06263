"""The figures of an evaluation as a table to paste: Markdown, LaTeX, or CSV with every digit."""

from __future__ import annotations

import csv
import io
import re
from typing import Literal, get_args

from dynlm.methods import STATIC
from dynlm.results import MethodResult, Results
from dynlm.types import InputError

Form = Literal["markdown", "latex", "csv"]
HEAD = ("method", "word perplexity", "bits per byte", "gain over static, nats per token [95 %]")
LATEX = str.maketrans({c: rf"\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"})
CSV = ("method", "kind", "word_ppl", "bits_per_byte", "gain_nats_per_token", "gain_low", "gain_high", "tokens_per_s")


def table(results: Results, form: Form) -> str:
    """Return a row for each method, the best last; it ends with a newline.

    Raises:
        InputError: an unknown form.
    """
    if form not in get_args(Form):
        raise InputError(f"there is no table of the form {form!r}: choose from {', '.join(get_args(Form))}")
    methods = dict(sorted(results["methods"].items(), key=lambda item: -item[1]["nats"]))
    if form == "csv":
        return _csv(methods)
    rows = [HEAD, *(_row(name, method) for name, method in methods.items())]
    return _markdown(rows) if form == "markdown" else _latex(rows)


def _row(name: str, method: MethodResult) -> tuple[str, ...]:
    """Return the cells of a method, rounded as in the report; static has no gain over itself."""
    low, high = method["gain_ci95"] or (None, None)
    interval = f" [{low:.4f}, {high:.4f}]" if low is not None and high is not None else ""
    gain = "" if name == STATIC else f"{method['gain_nats_per_token']:.4f}{interval}"
    return name, _number(method["word_ppl"], ",.2f"), _number(method["bits_per_byte"], ".4f"), gain


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(HEAD)}", *lines[1:], ""])


def _latex(rows: list[tuple[str, ...]]) -> str:
    """For the package booktabs."""
    head, *body = (" & ".join(_minus(cell.translate(LATEX)) for cell in row) + r" \\" for row in rows)
    return "\n".join(
        [r"\begin{tabular}{lrrl}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""]
    )


def _minus(cell: str) -> str:
    """Set the signs of numbers in mathematics: elsewhere a hyphen is one."""
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", cell)


def _csv(methods: dict[str, MethodResult]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV)
    for name, method in methods.items():
        low, high = method["gain_ci95"] or (None, None)
        figures = (method["word_ppl"], method["bits_per_byte"], method["gain_nats_per_token"], low, high)
        writer.writerow([name, method["kind"], *figures, method["tokens_per_s"]])
    return text.getvalue()
