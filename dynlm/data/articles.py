"""Sources of articles and their split into train, meta, valid and test.

A source is one of
    stdlib                         the documentation that Python carries; no file, no download
    FOLDER                         WikiText files ``wiki.{train,valid,test}.tokens`` (or ``.raw``) in it
    FILE or GLOB                   ``.tokens``, ``.raw``, ``wiki.*.txt`` (WikiText), ``.txt`` (an article a file),
                                   ``.jsonl``, ``.parquet``: an article a row, or WikiText with a line a row, as the hub
                                   has it. Names of files that tell splits (train, validation, test) give them
    wikitext-2, wikitext-103       presets of the Hugging Face hub, from its cache when offline
    hf:NAME or hf:NAME/CONFIG      any Hugging Face data set with a text column (dynlm.data.hub)
    hf:FOLDER                      what ``datasets.load_dataset`` makes of a folder
Environment variables (``$DYNLM_WIKITEXT2``) are expanded.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynlm.data import stdlib, wikitext
from dynlm.data.hub import read_hub
from dynlm.data.rows import Columns, from_rows, is_wikitext, joined_lines, make_article, split_of_name, texts_of
from dynlm.files import why_unreadable
from dynlm.lazy import optional
from dynlm.settings import Seed, Settings, Whole, build
from dynlm.types import Article, InputError

SPLITS = ("train", "meta", "valid", "test")
PRESETS = {
    "wikitext-2": "hf:Salesforce/wikitext/wikitext-2-v1",
    "wikitext-103": "hf:Salesforce/wikitext/wikitext-103-v1",
}
WIKITEXT = (".tokens", ".raw", ".txt")
BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


@dataclass(frozen=True)
class DataConfig(Settings):
    """Where articles come from and how they are split."""

    source: str = "stdlib"
    """stdlib, WikiText folder or .tokens file, .txt/.jsonl/.parquet file or glob, wikitext-2, wikitext-103, hf:NAME"""
    text_column: str = "text"
    """column of the article's text in .jsonl, .parquet and hub data sets"""
    title_column: str = "title"
    """column of its title; articles without one are numbered"""
    meta_articles: Whole = 60
    """articles kept out of base training, to tune and meta-train on (at most a quarter of the source)"""
    held_out: Whole = 24
    """articles of valid, and again of test, where the source has no split of its own (at most an eighth each)"""
    split_seed: Seed = 0
    """the split orders articles by a hash of this seed and their ids"""

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.title_column)


@dataclass(frozen=True)
class Corpus:
    """The four splits.

    Attributes:
        train: what base models and tokenizers are trained on.
        meta: unseen by the base model: rules are tuned and meta-trained on it. Tokenizers see it.
        valid: what ``evaluate`` reads unless another split is asked for.
        test: read at the very end.
    """

    train: tuple[Article, ...]
    meta: tuple[Article, ...]
    valid: tuple[Article, ...]
    test: tuple[Article, ...]

    def split(self, name: str) -> tuple[Article, ...]:
        """One split by name; an unknown or empty one is an error."""
        if name not in SPLITS:
            raise InputError(f"unknown split {name!r}: choose one of {', '.join(SPLITS)}")
        articles: tuple[Article, ...] = getattr(self, name)
        if not articles:
            filled = ", ".join(s for s in SPLITS if getattr(self, s)) or "none"
            raise InputError(f"split {name!r} of this source holds no article: splits with articles are {filled}")
        return articles

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all splits, ids and texts: equal fingerprints mean equal data."""
        digest = hashlib.sha256()
        for name in SPLITS:
            for article in getattr(self, name):
                digest.update(f"{name}\0{article.id}\0{article.text}\0".encode())
        return digest.hexdigest()[:16]


def load_corpus(source: str | DataConfig = DataConfig.source, **settings: Any) -> Corpus:
    """Read a source and split it; the same settings give the same splits on every machine.

    Args:
        source: what ``data.source`` of a recipe takes, such as a glob of text files, or all settings at once.
        settings: of :class:`DataConfig`: meta_articles, held_out, text_column, title_column, split_seed.

    Raises:
        InputError: a missing file, a glob that matches nothing, an unset variable, an empty corpus, unknown settings.
    """
    given = {"source": source} if isinstance(source, str) else asdict(source)
    config: DataConfig = build(DataConfig, {**given, **settings}, "data")
    pools = read_pools(config)
    total = sum(len(pool) for pool in pools.values())
    if total == 0:
        raise InputError(f"source {config.source!r} holds no article: expected non-empty text")
    if set(pools) == {"all"}:
        return _split_one_pool(pools["all"], config)
    train = _by_hash(pools.get("train", []), config.split_seed)
    n_meta = min(config.meta_articles, len(train) // 4)
    kept_out = {article.id for article in train[:n_meta]}
    return Corpus(
        train=tuple(a for a in pools.get("train", []) if a.id not in kept_out),
        meta=tuple(train[:n_meta]),
        valid=tuple(pools.get("valid", [])),
        test=tuple(pools.get("test", [])),
    )


def load_texts(config: DataConfig, split: str) -> tuple[Article, ...]:
    """Read texts that no training has divided: a source's own split, or all of a source without splits.

    Raises:
        InputError: as :func:`load_corpus`, and a split that the source has not.
    """
    pools = read_pools(config)
    found = pools.get("all", pools.get(split, []))
    if not found:
        raise InputError(f"source {config.source!r} has no articles of the split {split!r}: it has {', '.join(pools)}")
    return tuple(found)


def _split_one_pool(pool: list[Article], config: DataConfig) -> Corpus:
    order = _by_hash(pool, config.split_seed)
    n_held_out = min(config.held_out, len(order) // 8)
    n_meta = min(config.meta_articles, len(order) // 4)
    valid, test = order[:n_held_out], order[n_held_out : 2 * n_held_out]
    meta = order[2 * n_held_out : 2 * n_held_out + n_meta]
    return Corpus(tuple(order[2 * n_held_out + n_meta :]), tuple(meta), tuple(valid), tuple(test))


def _by_hash(articles: Iterable[Article], seed: int) -> list[Article]:
    """Return a shuffle that depends on ids only, so that adding an article moves no other between splits' order."""
    return sorted(articles, key=lambda article: hashlib.sha256(f"{seed}:{article.id}".encode()).digest())


def read_pools(config: DataConfig) -> dict[str, list[Article]]:
    """Articles by the source's own splits, or all under ``"all"`` where it has none. Empty articles are left out."""
    source = os.path.expandvars(config.source)
    if source.startswith("$"):
        message = f"environment variable {source} is not set: point it at the data, or name another source"
        raise InputError(message, setting="data.source")
    source = PRESETS.get(source, source)
    if source == "stdlib":
        pools = {"all": stdlib.load_articles()}
    elif source.startswith("hf:"):
        pools = read_hub(source.removeprefix("hf:"), config.columns)
    elif Path(source).is_dir():
        pools = _read_folder(Path(source))
    else:
        pools = _read_files(source, config)
    return {name: [a for a in pool if a.text.strip()] for name, pool in pools.items()}


def _read_folder(folder: Path) -> dict[str, list[Article]]:
    found: dict[str, list[Article]] = {}
    for split in ("train", "valid", "test"):
        path = next((p for end in WIKITEXT if (p := folder / f"wiki.{split}{end}").is_file()), None)
        if path is not None:
            found[split] = _read_wikitext(path)
    if not found:
        raise InputError(
            f"{folder} holds no wiki.train.tokens, wiki.valid.tokens or wiki.test.tokens: name a file or glob, or "
            f"hf:{folder} for a data set of Hugging Face"
        )
    return found


def _read_wikitext(path: Path) -> list[Article]:
    articles = wikitext.split_articles(_read_text(path).replace("\r\n", "\n"), path.stem)
    if not articles:
        raise InputError(f"{path} has no WikiText title line (` = Title = ` between empty lines): rename it to .txt?")
    return articles


def _read_text(path: Path) -> str:
    """Return the text of a file, byte for byte."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if "\0" in text:
        raise InputError(f"{path} holds NUL bytes (the first at character {text.index(chr(0))}): it is no UTF-8 text")
    return text


def _read_files(pattern: str, config: DataConfig) -> dict[str, list[Article]]:
    """Articles of all files, by the splits that their names tell: all of them, and of more than one."""
    paths = [Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if not Path(p).is_dir()]
    if not paths:
        kind = "glob matches no file" if glob.has_magic(pattern) else f"file {why_unreadable(pattern)}"
        raise InputError(f"data source {pattern!r}: {kind}")
    for path in paths:
        again = None if path.is_file() else "is a pipe or device, which can be read only once: write it to a file"
        if reason := why_unreadable(path) or again:
            raise InputError(f"data source {path} {reason}")
    named = {path: split_of_name(path.name) for path in paths}
    if None in named.values() or len(set(named.values())) < 2:
        return {"all": _articles_of(paths, "all", config.columns)}
    by_split: dict[str, list[Path]] = {}
    for path, split in named.items():
        by_split.setdefault(str(split), []).append(path)
    return {split: _articles_of(files, split, config.columns) for split, files in by_split.items()}


def _articles_of(paths: Sequence[Path], split: str, columns: Columns) -> list[Article]:
    articles: list[Article] = []
    rows: list[tuple[Path, list[Mapping[str, Any]]]] = []
    for path in paths:
        if path.suffix in (".tokens", ".raw") or (path.suffix == ".txt" and path.name.startswith("wiki.")):
            articles += _read_wikitext(path)
        elif path.suffix == ".txt":
            articles.append(make_article(str(path), path.stem, _read_text(path)))
        elif path.suffix in (".jsonl", ".parquet"):
            rows.append((path, list((_json_rows if path.suffix == ".jsonl" else _parquet_rows)(path))))
        else:
            known = ".tokens, .raw, .txt, .jsonl, .parquet"
            raise InputError(f"{path}: unknown ending {path.suffix!r}: expected one of {known}")
    lines = [text for path, of_file in rows for text in texts_of(of_file, path.stem, columns)]
    if is_wikitext(lines):  # an article may go on in the next file
        return articles + wikitext.split_articles(joined_lines(lines), f"wiki.{split}")
    return articles + [a for path, of_file in rows for a in from_rows(of_file, path.stem, columns)]


def _json_rows(path: Path) -> Iterable[Mapping[str, Any]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line.removeprefix(BOM) if number == 1 else line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}, line {number}: a {type(row).__name__}, expected an object with a text column"
                )
            yield row


def _parquet_rows(path: Path) -> Iterable[Mapping[str, Any]]:
    with optional(str(path)):
        import pyarrow
        import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()  # type: ignore[no-any-return]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable parquet file ({error})") from None
