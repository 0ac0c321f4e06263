"""dynlm's own tokenizers as transformers has them, id for id: what ``AutoTokenizer`` loads from a model's folder.

A text has the ids that dynlm gives it, without the end of a line that the text does not have: dynlm ends every line.
Special tokens are no markup: a text that holds ``<eos>`` or ``<unk>`` is read as it stands (``split_special_tokens``).
The end of a line is the start and the end token too, which ``decode(..., skip_special_tokens=True)`` leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
BLANKS = "[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"
"""where ``str.split`` cuts"""


def byte_pairs(
    pieces: Sequence[str], unknown: str, whole: Collection[str], escapes: Mapping[str, str], *, spells_bytes: bool
) -> PreTrainedTokenizerFast:
    """SentencePiece's byte pairs; ``pieces`` have blanks for ``▁``, and the earlier of two is merged first.

    ``whole`` are found before anything is merged; ``escapes`` are made one after another. SentencePiece merges two
    neighbors wherever they make a piece, and of equal ones the left: the merges are all splits of all pieces. Only
    where two splits of one piece overlap, as ab|a and a|ba in ababa, could the order differ; no text of the tests,
    periodic ones included, has such neighbors.
    """
    mergeable = {piece for piece in pieces if not BYTE_PIECE.fullmatch(piece)} - {*whole, unknown}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        if piece in mergeable
        for cut in range(1, len(piece))
        if piece[:cut] in mergeable and piece[cut:] in mergeable
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=spells_bytes)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Replace(old, new) for old, new in escapes.items()])
    back = [decoders.Replace(new, old) for old, new in reversed(list(escapes.items()))]
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), *back] if spells_bytes else [decoders.Fuse()]
    )
    backend.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in whole])
    return _ready(backend, bos_token="\n", eos_token="\n", unk_token=unknown, pad_token=unknown)


def whole_words(words: Sequence[str], end: str, unknown: str) -> PreTrainedTokenizerFast:
    """Words between blanks; ``end`` ends lines. Where ``unknown`` is no word, a text with unseen words is an error."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    backend.normalizer = normalizers.Replace("\n", f" {end} ")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(BLANKS), "removed")
    spaced = decoders.WordPiece(prefix="\n", cleanup=False)  # a blank before every word but the first
    backend.decoder = decoders.Sequence([spaced, decoders.Fuse(), decoders.Replace(Regex(f" ?{end} ?"), "\n")])
    return _ready(backend, bos_token=end, eos_token=end, pad_token=end, unk_token=unknown if unknown in words else None)


def _ready(backend: Tokenizer, **special: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, split_special_tokens=True, clean_up_tokenization_spaces=False, **special
    )
