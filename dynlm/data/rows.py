"""Rows with a column of text, as tables and data sets have them: an article each, or WikiText with a line each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dynlm.data import wikitext
from dynlm.types import Article, InputError

Row = Mapping[str, Any]
SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "valid", "valid": "valid", "val": "valid", "dev": "valid",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


class Columns(NamedTuple):
    """The names of the columns that are read."""

    text: str
    title: str


def split_of_name(name: str) -> str | None:
    """Return the split that a file's name tells, as data sets on the hub name their files; None without one."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for word in words if (split := SPLIT_WORDS.get(word))), None)


def make_article(id: str, title: str, text: str) -> Article:
    """Return an article whose text ends with a newline."""
    return Article(id, title, text if text.endswith("\n") else text + "\n")


def from_rows(rows: Sequence[Row], source: str, columns: Columns) -> list[Article]:
    """Read an article from each row."""
    articles = []
    for number, (row, text) in enumerate(zip(rows, texts_of(rows, source, columns), strict=True)):
        title = row.get(columns.title) or f"{source} {number}"
        articles.append(make_article(f"{source}:{number}", str(title), text))
    return articles


def texts_of(rows: Iterable[Row], source: str, columns: Columns) -> list[str]:
    """Return the texts of rows.

    Raises:
        InputError: a row without text in its column.
    """
    texts = []
    for number, row in enumerate(rows):
        text = row.get(columns.text)
        if not isinstance(text, str):
            missing = f"no text in column {columns.text!r} (columns: {', '.join(map(str, row))})"
            message = f"{source}, row {number}: {missing}: name the one that holds the text"
            raise InputError(message, setting="data.text_column")
        texts.append(text)
    return texts


def is_wikitext(lines: Sequence[str]) -> bool:
    """Return whether rows are WikiText as the hub has it: a line a row, empty ones among them, with title lines."""
    if any(line and line.find("\n") != len(line) - 1 for line in lines) or "" not in lines:
        return False
    return bool(wikitext.split_articles(joined_lines(lines), ""))


def joined_lines(lines: Iterable[str]) -> str:
    """Return the file that such rows were made of, byte for byte: the hub's version drops the blank of empty lines."""
    return "".join(line or " \n" for line in lines)
