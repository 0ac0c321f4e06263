"""A user's own texts: plain text, Markdown, HTML, JSON lines and standard input, as streams of chunks.

Chunks end where a line ends, or before a blank within a very long line, so that tokens are those of the whole text.
Bytes that are not UTF-8 become U+FFFD and are counted in ``notes``; line ends become ``\\n``; a text ends with one.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import BinaryIO

from dynlm.data.tokenizers import Tokenizer
from dynlm.files import why_unreadable
from dynlm.types import Article, InputError

STDIN = "-"
BLOCK = 1 << 16  # bytes
LONG_LINE = 1 << 14  # characters that a chunk may have without an end of line
CONTROL_SHARE = 0.3
UNDECODED = re.compile("[\udc80-\udcff]")
SURROGATES = re.compile("[\ud800-\udfff\0]")
CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f\ufffd]")
HTML_SUFFIXES = (".html", ".htm", ".xhtml")
BLOCKS = """
address article aside blockquote body br caption dd details div dl dt fieldset figcaption figure
footer form h1 h2 h3 h4 h5 h6 header hr li main nav ol option p pre section summary table td th
title tr ul
"""
BLOCK_TAGS = frozenset(BLOCKS.split())
HIDDEN = frozenset(("script", "style", "template", "title"))
WORD = re.compile(r"[^\S\n]*\S+ ?")
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


@dataclass
class Text:
    """One text to read. ``chunks`` can be taken once; joined they are the whole text, which ends with a newline."""

    id: str
    title: str
    chunks: Iterator[str]
    notes: list[str] = field(default_factory=list)
    """what had to be changed, complete when the chunks are at their end"""

    def article(self) -> Article:
        """Return the whole text at once."""
        return Article(self.id, self.title, "".join(self.chunks))


Source = str | Path | Article | Text
"""a text itself, the path of a file, or either of these records"""


def read_texts(names: Sequence[str], stdin: BinaryIO | None = None) -> Iterator[Text]:
    """The texts of files in order, ``-`` for standard input; a ``.jsonl`` file holds several. All names are looked at
    before the first text comes.

    Raises:
        InputError: a missing, empty or binary file, bad JSON; for a stream while its chunks are taken.
    """
    if not names:
        raise InputError("no text to read: name files (.txt, .md, .html, .jsonl), or - for standard input")
    if list(names).count(STDIN) > 1:
        raise InputError("standard input (-) can be read only once")
    for name in names:
        if name != STDIN and (reason := why_unreadable(name)):
            raise InputError(f"{name} {reason}{': name the files in it' if Path(name).is_dir() else ''}")
    return (text for name in names for text in _texts_of(name, stdin))


def as_texts(*sources: Source) -> Iterator[Text]:
    """Yield the texts of sources in order: a string is a text, a path names a file as :func:`read_texts` takes it.

    Raises:
        InputError: an empty text, a file that cannot be read, a string that is the name of a file.
    """
    for source in sources:
        if isinstance(source, Text):
            yield source
        elif isinstance(source, Article):
            yield Text(source.id, source.title, _chunks(_nonempty(source.title, [source.text])))
        elif isinstance(source, Path):
            yield from read_texts([str(source)])
        elif len(source) < 4096 and "\n" not in source and os.path.isfile(source):
            raise InputError(f"{source!r} is the name of a file: give Path({source!r}) to read what is in it")
        else:
            yield Text(
                "text", "text", _chunks(_nonempty("the text", [SURROGATES.sub("\N{REPLACEMENT CHARACTER}", source)]))
            )


def _texts_of(name: str, stdin: BinaryIO | None) -> Iterator[Text]:
    path, notes = Path(name), list[str]()
    suffix = path.suffix.lower()
    if name == STDIN:
        parts = decoded("standard input", stdin or sys.stdin.buffer, notes)
        yield Text(name, "standard input", _chunks(_nonempty("standard input", parts)), notes)
    elif suffix == ".jsonl":
        yield from _json_lines(name, path.stem)
    elif suffix in HTML_SUFFIXES:
        yield _html(name, path.stem)
    else:
        yield Text(name, path.name, _chunks(_nonempty(name, _characters(name, notes))), notes)


def _characters(name: str, notes: list[str]) -> Iterator[str]:
    with opened(name) as file:
        yield from decoded(name, file, notes)


@contextmanager
def opened(name: str) -> Iterator[BinaryIO]:
    """A file to read, with one line for what the system refuses."""
    try:
        with Path(name).open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from None


def decoded(name: str, file: BinaryIO, notes: list[str]) -> Iterator[str]:
    """Yield the characters of a file as they come: what :meth:`read1` gives, decoded.

    Raises:
        InputError: a NUL byte, or a first block that is mostly control characters or not UTF-8.
    """
    utf8 = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    read = getattr(file, "read1", file.read)
    replaced, first, block = 0, True, b"."
    while block:
        block = read(BLOCK)
        characters, n = UNDECODED.subn("\N{REPLACEMENT CHARACTER}", decoder.decode(block, final=not block))
        share = len(CONTROLS.findall(characters)) / max(1, len(characters)) if first else 0.0
        if b"\0" in block or share > CONTROL_SHARE:
            raise InputError(f"{name} is binary, or text that is not UTF-8: give plain text, Markdown, HTML or .jsonl")
        replaced, first = replaced + n, first and not characters
        if characters:
            yield SURROGATES.sub("\N{REPLACEMENT CHARACTER}", characters)
    if replaced:
        notes.append(f"{name}: {replaced} byte{'s' * (replaced > 1)} not UTF-8, read as U+FFFD")


def _nonempty(name: str, parts: Iterable[str]) -> Iterator[str]:
    """Yield the parts, or an error where all of them together are blank."""
    blank: str | None = ""
    for part in parts:
        if blank is not None:
            blank += part
            if not blank.strip():
                continue
            part, blank = blank, None
        yield part
    if blank is not None:
        raise InputError(f"{name} is empty: nothing to read")


def _chunks(parts: Iterable[str]) -> Iterator[str]:
    """Yield the same text in chunks, with a newline at its end."""
    held, ended = "", True
    for part in parts:
        held += part
        while cut := _cut(held):
            yield held[:cut]
            ended, held = held[cut - 1] == "\n", held[cut:]
    if held or not ended:
        yield held + "\n"


def _cut(held: str) -> int:
    """After the last end of line, or before a blank of a line that grows too long; 0: wait for more."""
    if end := held.rfind("\n") + 1:
        return end
    if len(held) <= LONG_LINE:
        return 0
    blank = held.rfind(" ", 1, LONG_LINE)
    return blank if blank > 0 else LONG_LINE


def _html(name: str, title: str) -> Text:
    notes: list[str] = []
    page = _Page()
    page.feed("".join(_nonempty(name, _characters(name, notes))))
    page.close()
    body = page.text()
    if not body:
        raise InputError(f"{name} holds no text outside tags, scripts and styles: nothing to read")
    return Text(name, " ".join(page.title.split()) or title, _chunks([body]), notes)


class _Page(HTMLParser):
    """The text of a page, a line a block; blanks as a browser shows them, kept as they are within ``pre``."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.title = ""
        self.hidden: list[str] = []
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in HIDDEN:
            self.hidden.append(tag)
        if tag in BLOCK_TAGS:
            self.parts.append("\n")
        self.pre += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCK_TAGS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.hidden:
            while self.hidden.pop() != tag:
                pass
        if tag in BLOCK_TAGS:
            self.parts.append("\n")
        self.pre = max(0, self.pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self.hidden:
            self.title += data if self.hidden[-1] == "title" else ""
            return
        if not self.pre:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1][-1].isspace():
                data = data.lstrip(" ")
        if data:
            self.parts.append(data)

    def text(self) -> str:
        lines = (line.rstrip() for line in "".join(self.parts).split("\n"))
        body = "\n".join(line for line in lines if line)
        return SURROGATES.sub("\N{REPLACEMENT CHARACTER}", body) + "\n" if body else ""


def _json_lines(name: str, stem: str) -> Iterator[Text]:
    found = 0
    with opened(name) as file:
        for number, line in enumerate(file, 1):
            notes: list[str] = []
            source = "".join(decoded(f"{name}, line {number}", io.BytesIO(line), notes))
            if not source.strip():
                continue
            title, body = _json_row(source, f"{name}, line {number}")
            if body.strip():
                found += 1
                yield Text(f"{name}:{number}", title or f"{stem} {number}", _chunks([body]), notes)
    if not found:
        raise InputError(f"{name} is empty: no line with a text")


def _json_row(source: str, where: str) -> tuple[str, str]:
    """Return (title or nothing, text) of one line."""
    try:
        row = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f'{where}: expected an object with a string under "text"')
    text = SURROGATES.sub("\N{REPLACEMENT CHARACTER}", row["text"])
    return str(row.get("title") or ""), text.replace("\r\n", "\n").replace("\r", "\n")


def encode_chunk(tokenizer: Tokenizer, chunk: str) -> list[int]:
    """Token ids of one chunk; none for an end of line that the chunk does not have."""
    ids = tokenizer.encode(chunk)
    ends_lines = [] != tokenizer.encode("") == tokenizer.encode("\n")  # as words and SentencePiece, not as others
    return ids[:-1] if ends_lines and not chunk.endswith("\n") else ids


def surfaces(pieces: Sequence[str], text: str) -> list[str]:
    """Return the stretch of ``text`` that each token stands for: as many strings as tokens, which joined are ``text``.

    A token that does not stand in the text as its piece says (unknown characters, bytes of one character, blanks that
    were dropped) takes what there is up to the next one that does.
    """
    found: list[str] = []
    here, same = 0, text.replace("▁", " ")  # SentencePiece reads its sign for a blank as a blank
    for i, piece in enumerate(pieces):
        if piece and same.startswith(piece, here):
            end = here + len(piece)
        elif byte := BYTE_PIECE.fullmatch(piece):
            end = here + (int(byte[1], 16) & 0xC0 != 0x80)  # a character's first byte stands for all of it
        elif piece == "\n":
            end = same.find(piece, here) + 1 or len(text)
        elif piece.endswith(" ") and (word := WORD.match(same, here)):  # word level
            end = word.end()
        else:
            end = _next(pieces[i + 1 : i + 9], same, here)
        end = min(end, len(text))
        found.append(text[here:end])
        here = end
    if found:
        found[-1] += text[here:]
    return found


def _next(following: Sequence[str], text: str, here: int) -> int:
    """Return where the first of the following pieces that stands in the text begins."""
    places = (text.find(piece, here) for piece in following if piece)
    return next((place for place in places if place >= 0), len(text))
