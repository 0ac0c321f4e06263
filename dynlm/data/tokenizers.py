"""Tokenizers behind one small interface: word level, SentencePiece, and any Hugging Face tokenizer.

Words and bytes are counted on the text itself, never on tokens, so that nats over tokens convert without loss into word
perplexity and bits per byte. ``decode(encode(text)) == text`` for SentencePiece with byte fallback (or full character
coverage); word level keeps words and lines and maps unseen words to ``<unk>``.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Protocol, TypedDict, cast

import torch

from dynlm.files import read_json, replacing, require_file, write_json
from dynlm.lazy import optional
from dynlm.settings import Bound, Settings, check, shown
from dynlm.types import Article, InputError, TokenizedArticle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # seconds of imports

GGUF = ".gguf"
ESCAPE = "\ue000"  # of the private use area


@dataclass(frozen=True)
class TokenizerConfig(Settings):
    """How text becomes tokens. Trained on the train and meta splits, never on valid or test."""

    kind: Literal["sentencepiece", "word", "huggingface"] = "sentencepiece"
    """sentencepiece (byte pairs, trained here), word (whitespace words and <eos>), huggingface (a ready tokenizer)"""
    vocab_size: Annotated[int, Bound(2, 2**20)] = 4096
    """entries; sentencepiece only"""
    byte_fallback: bool = True
    """spell unseen characters as bytes (256 entries); off: every character of the training text is an entry"""
    name: str = ""
    """hub name (read from the local cache) or folder; huggingface only"""


class Tokenizer(Protocol):
    """What the toolkit needs of a tokenizer."""

    vocab_size: int
    start_id: int
    """the token that stands before an article's first one"""
    unk_id: int | None
    """the token of everything that the tokenizer does not know; None where it knows all"""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def pieces(self, ids: Sequence[int]) -> list[str]: ...
    def save(self, folder: Path) -> None: ...

    def pretrained(self) -> PreTrainedTokenizerBase:
        """Return the same tokens for transformers, to be saved beside a model."""


class WordTokenizer:
    """Whitespace words; ``<eos>`` ends each line. WikiText-2's training file gives exactly 33,278 entries."""

    EOS, UNK = "<eos>", "<unk>"

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.index = {word: i for i, word in enumerate(self.words)}
        self.vocab_size = len(self.words)
        self.eos_id = self.start_id = self.index[self.EOS]
        self.unk_id = self.index.get(self.UNK)

    @classmethod
    def train(cls, texts: Iterable[str]) -> WordTokenizer:
        """Return all words, by falling frequency. ``<unk>`` is an entry where the text holds it (WikiText does)."""
        counts = Counter(word for text in texts for word in text.split())
        counts.pop(cls.EOS, None)
        return cls([cls.EOS, *(word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])))])

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for line in _lines(text):
            ids.extend(self._id(word) for word in line.split())
            ids.append(self.eos_id)
        return ids

    def _id(self, word: str) -> int:
        found = self.index.get(word, self.unk_id)
        if found is None:
            raise InputError(f"word {word!r} is not in the vocabulary, which has no <unk>: use kind = 'sentencepiece'")
        return found

    def decode(self, ids: Sequence[int]) -> str:
        lines = " ".join(self.words[i] for i in ids).split(f"{self.EOS}")
        return "\n".join(line.strip(" ") for line in lines)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return ["\n" if i == self.eos_id else f"{self.words[i]} " for i in ids]

    def save(self, folder: Path) -> None:
        write_json(folder / "tokenizer.json", {"kind": "word", "words": self.words})

    def pretrained(self) -> PreTrainedTokenizerBase:
        from dynlm.data.fast import whole_words

        return whole_words(self.words, self.EOS, self.UNK)


class SentencePieceTokenizer:
    """SentencePiece byte pairs with a newline symbol; spaces, ``<unk>`` and all else are kept as they stand."""

    WHOLE = ("▁<unk>", "<unk>")  # WikiText's <unk> is a word of the text

    def __init__(self, model_proto: bytes) -> None:
        with optional("a SentencePiece tokenizer"):
            import sentencepiece

        self._proto = model_proto
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        except RuntimeError as error:
            raise InputError(f"not a SentencePiece model ({error}): train the tokenizer again") from None
        self.vocab_size = self._processor.get_piece_size()
        self.eos_id = self.start_id = self._processor.piece_to_id("\n")
        self.unk_id: int | None = self._processor.unk_id()
        self._spells_bytes = self._processor.piece_to_id("<0xEE>") != self.unk_id

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> SentencePieceTokenizer:
        with optional("a SentencePiece tokenizer"):
            import sentencepiece

        sentences = (line for text in texts for line in _lines(text) if line.strip())
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences,
                model_writer=model,
                vocab_size=config.vocab_size,
                model_type="bpe",  # 15 % fewer tokens a word than unigram on WikiText-2, docs/LOG.md
                byte_fallback=config.byte_fallback,
                character_coverage=0.9995 if config.byte_fallback else 1.0,
                # lossless: text goes in and comes out unchanged
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                user_defined_symbols=["\n", *cls.WHOLE],
                unk_piece="<oov>",
                bos_id=-1,
                eos_id=-1,
                max_sentence_length=1 << 16,
                num_threads=1,  # the same pieces on every machine
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(
                f"SentencePiece could not make {config.vocab_size} pieces of this text ({reason})"
            ) from None
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for line_ids in self._processor.encode(_lines(self._escaped(text))):
            ids.extend(line_ids)
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text = cast(str, self._processor.decode(list(ids)))
        if not self._spells_bytes:
            return text
        text = text.replace("▁", " ")  # a blank that was spelled, as no text of training had one
        return text.replace(ESCAPE + "1", "▁").replace(ESCAPE + "0", ESCAPE)

    def _escaped(self, text: str) -> str:
        """Put another sign for ▁, which SentencePiece takes for a blank, where it can spell that as bytes."""
        if not self._spells_bytes or ("▁" not in text and ESCAPE not in text):
            return text
        return text.replace(ESCAPE, ESCAPE + "0").replace("▁", ESCAPE + "1")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._processor.id_to_piece(int(i)).replace("▁", " ") for i in ids]

    def save(self, folder: Path) -> None:
        write_json(folder / "tokenizer.json", {"kind": "sentencepiece"})
        with replacing(folder / "sentencepiece.model") as temporary:
            temporary.write_bytes(self._proto)

    def pretrained(self) -> PreTrainedTokenizerBase:
        from dynlm.data.fast import byte_pairs

        pieces = self.pieces(range(self.vocab_size))
        unknown, whole = pieces[cast(int, self.unk_id)], [piece.replace("▁", " ") for piece in self.WHOLE]
        escapes = {ESCAPE: ESCAPE + "0", "▁": ESCAPE + "1"} if self._spells_bytes else {"▁": " "}
        if self._spells_bytes and " " not in pieces:  # then it is spelled, as SentencePiece's sign for it
            escapes[" "] = "▁"
        return byte_pairs(pieces, unknown, whole, escapes, spells_bytes=self._spells_bytes)


class HuggingFaceTokenizer:
    """Any tokenizer that ``AutoTokenizer`` loads, from a folder or the hub's cache; no special token is added."""

    def __init__(self, tokenizer: Any) -> None:
        """``tokenizer``: one of transformers, or the folder or hub name that it is loaded from."""
        self._tokenizer = _from_hub(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.vocab_size = len(self._tokenizer)
        starts = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, 0)
        self.start_id = next(token for token in starts if token is not None)
        self.unk_id: int | None = self._tokenizer.unk_token_id

    def encode(self, text: str) -> list[int]:
        return cast(list[int], self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return cast(str, self._tokenizer.decode(list(ids)))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [cast(str, self._tokenizer.decode([i])) for i in ids]

    def save(self, folder: Path) -> None:
        write_json(folder / "tokenizer.json", {"kind": "huggingface"})
        with replacing(folder / "huggingface") as temporary:
            self._tokenizer.save_pretrained(temporary)

    def pretrained(self) -> PreTrainedTokenizerBase:
        return cast("PreTrainedTokenizerBase", self._tokenizer)


def gguf_in(path: str | Path) -> tuple[str, dict[str, str]]:
    """Return what transformers takes for a ``.gguf`` file: its folder, and a keyword with its name.

    Raises:
        InputError: the package gguf is not installed.
    """
    with optional(str(path)):
        import_module("gguf")
    return str(Path(path).parent), {"gguf_file": Path(path).name}


def _from_hub(name: str) -> Any:
    with optional(f"tokenizer {name!r}"):
        from transformers import AutoTokenizer

    place, within = gguf_in(name) if name.endswith(GGUF) and Path(name).is_file() else (name, {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False, **within)
        if not tokenizer.vocab_size:  # what a folder with a model alone gives
            raise ValueError("it has no entries")
    except Exception as error:  # the loader raises many kinds; all mean that there is no whole tokenizer
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"tokenizer {name!r} cannot be loaded ({reason}): give a folder that holds one, or fetch it with "
            f"`hf download`"
        ) from None
    return tokenizer


def as_tokenizer(tokenizer: object) -> Tokenizer:
    """Return a tokenizer of ours as it is, and one of transformers as one of ours.

    Raises:
        InputError: neither.
    """
    if isinstance(tokenizer, WordTokenizer | SentencePieceTokenizer | HuggingFaceTokenizer):
        return tokenizer
    if not hasattr(tokenizer, "unk_token_id"):
        raise InputError(f"tokenizer is {shown(tokenizer)}: give the model's tokenizer, as AutoTokenizer loads it")
    return HuggingFaceTokenizer(tokenizer)


def _lines(text: str) -> list[str]:
    """Return the lines of a text that ends with a newline."""
    return text.removesuffix("\n").split("\n")


def train_tokenizer(config: TokenizerConfig, articles: Iterable[Article]) -> Tokenizer:
    """Fit ``config.kind`` on the articles' texts (a ready Hugging Face tokenizer is only loaded)."""
    texts = [article.text for article in articles]
    if config.kind == "word":
        return WordTokenizer.train(texts)
    if config.kind == "huggingface":
        return HuggingFaceTokenizer(config.name)
    return SentencePieceTokenizer.train(texts, config)


class Record(TypedDict):
    """What tokenizer.json says."""

    kind: str
    words: NotRequired[list[str]]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the counterpart of ``Tokenizer.save``."""
    path = folder / "tokenizer.json"
    record: Record = check(Record, read_json(path), str(path))
    kind, words = record["kind"], record.get("words", [])
    if kind == "word":
        if WordTokenizer.EOS not in words or len(set(words)) < len(words):
            raise InputError(f"{path}: words lack {WordTokenizer.EOS}, or hold a word twice: train the tokenizer again")
        return WordTokenizer(words)
    if kind == "huggingface":
        return HuggingFaceTokenizer(str(folder / "huggingface"))
    if kind == "sentencepiece":
        path = folder / "sentencepiece.model"
        require_file(path)
        try:
            return SentencePieceTokenizer(path.read_bytes())
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    raise InputError(f"{path}: unknown kind {shown(kind)}")


def lost_share(tokenizer: Tokenizer, texts: Iterable[str], most: int = 20_000) -> float:
    """The share of the characters that do not come back from a tokenizer, as case, ends of lines or [UNK]; 0: lossless.

    At most the first ``most`` characters are looked at for the share, all of them for whether there is one.
    """
    lost, looked = 0, 0
    for text in texts:
        back = tokenizer.decode(tokenizer.encode(text))
        if back == text:
            looked += len(text)
            continue
        text, back = text[:most], back[:most]
        same = sum(block.size for block in SequenceMatcher(None, text, back, autojunk=False).get_matching_blocks())
        lost, looked = lost + max(1, len(text) - same), looked + len(text)
        if looked >= most:
            break
    return lost / max(1, looked)


def tokenize(tokenizer: Tokenizer, articles: Iterable[Article]) -> list[TokenizedArticle]:
    """Articles as token ids with the exact counts of their texts."""
    return [
        TokenizedArticle(a.id, a.title, torch.tensor(tokenizer.encode(a.text)), a.n_words, a.n_bytes) for a in articles
    ]
