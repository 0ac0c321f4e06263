"""A report's page, read back."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from dynlm.report.html import write_report
from dynlm.runs import Run
from tests.support.evaluations import pieces

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; ``open`` must be empty at the end of a well-formed one."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.source = write_report(run, pieces=pieces).read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(self.source)
        self.close()
        self.text = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def verdicts(page: Page) -> list[str]:
    """Return the last column of the comparisons."""
    table = page.source[page.source.index('aria-label="Comparisons"') :]
    return re.findall(r"<td>([^<]*)</td></tr>", table[: table.index("</table>")])
