"""Data sets of the Hugging Face hub, and folders that its library reads. Nothing in them is ever run."""

from __future__ import annotations

import re
from pathlib import Path

from dynlm.data import wikitext
from dynlm.data.rows import SPLIT_WORDS, Columns, from_rows, is_wikitext, joined_lines
from dynlm.lazy import optional
from dynlm.types import Article, InputError

NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*){0,2}")


def read_hub(name: str, columns: Columns) -> dict[str, list[Article]]:
    """Articles by split of ``NAME``, ``NAME/CONFIG`` or a folder.

    Raises:
        InputError: a name of another form, a data set that is not at hand or cannot be read.
    """
    with optional(f"data set {name!r}"):
        import datasets  # here and nowhere else: images without it can use every other source

    path, configuration = _place(name)
    try:
        splits = datasets.load_dataset(path, configuration)
    except Exception as error:  # the library raises many kinds; all mean that there is no such data set
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"data set {name!r} cannot be read ({reason}): check the name, its format and the network"
        ) from None
    pools: dict[str, list[Article]] = {}
    for split, rows in splits.items():
        pool = SPLIT_WORDS.get(str(split))
        if pool is None:
            continue
        if columns.text not in rows.column_names:
            there = ", ".join(rows.column_names)
            message = f"data set {name!r} has no column {columns.text!r} ({there}): name the one that holds the text"
            raise InputError(message, setting="data.text_column")
        lines = rows[columns.text]
        if is_wikitext([line for line in lines if isinstance(line, str)]):
            pools[pool] = wikitext.split_articles(joined_lines(lines), f"wiki.{pool}")
        else:
            pools[pool] = from_rows(list(rows), f"{path}.{split}", columns)
    return {"all": pools["train"]} if set(pools) == {"train"} else pools


def _place(name: str) -> tuple[str, str | None]:
    """Return (path, configuration) for ``datasets.load_dataset``; a folder of that name is taken before the hub."""
    if name and Path(name).is_dir():
        return name, None
    if not NAME.fullmatch(name):
        message = f"source hf:{name} is no folder, and no NAME, USER/NAME or USER/NAME/CONFIG of the hub"
        raise InputError(message, setting="data.source")
    parts = name.split("/")
    return (name, None) if len(parts) < 3 else ("/".join(parts[:2]), parts[2])
