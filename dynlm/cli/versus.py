"""``dynlm report RUN RUN``: two runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from dynlm.cli.terminal import usage_errors
from dynlm.runs import Run
from dynlm.session.evaluation import Results
from dynlm.session.targets import Target, is_report
from dynlm.settings import Settings


@dataclass(frozen=True)
class VersusSettings(Settings):
    """Set two evaluated runs side by side: paired differences over the articles that both read."""

    runs: tyro.conf.Positional[tuple[str, str]]
    """the two run directories; a difference above zero says that the second is better"""
    html: str = ""
    """the page to write; without it, FIRST-and-SECOND.html in this folder, by the names of the runs"""
    overwrite: bool = False
    """let the page replace a file that is no report of dynlm"""


def main(arguments: Sequence[str]) -> None:
    """The command, from its arguments."""
    with usage_errors():
        settings = tyro.cli(VersusSettings, prog="dynlm report", args=list(arguments))
    first, second = (Run(run) for run in settings.runs)
    name = settings.html or f"{first.path.resolve().name}-and-{second.path.resolve().name}.html"
    target = Target(name, [str(first.report), str(second.report)], is_report, settings.overwrite)
    with target.writing() as path:
        compared = Results.compare(first.path, second.path, path)
    print(compared.table())
    print(f"report: {name}")
