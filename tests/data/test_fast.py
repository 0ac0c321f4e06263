"""The tokenizers as transformers has them: the same ids, saved beside a model and loaded by AutoTokenizer."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dynlm.data.tokenizers import ESCAPE, TokenizerConfig, load_tokenizer, train_tokenizer
from dynlm.session.session import SHIPPED
from dynlm.types import Article

KIT = SHIPPED / "wikitext2"
PLAIN = "".join(f" The <unk> cat number {n} , sat on 3 @-@ {n * n} mats == 0.0.0 . . . \n" for n in range(60)) + "\n"
TANGLED = "".join("".join(random.Random(n).choices("ab0.= ", k=40)) + "\n" for n in range(300))
SIGNS = ["<0x41>", "<0x", "41", "日", "本"]
NO_BLANKS = "".join("".join(random.Random(n).choices(SIGNS, k=9)) + "\n" for n in range(300))
KINDS = {
    "bytes": (PLAIN, {"vocab_size": 400}),
    "characters": (PLAIN, {"vocab_size": 140, "byte_fallback": False}),
    "tangled": (TANGLED, {"vocab_size": 600}),
    "no blanks": (NO_BLANKS, {"vocab_size": 290}),
    "words": (PLAIN, {"kind": "word"}),
}
STRANGE = [" ", "  ", "\n", "\r\n", "\t", "\x00", "\x1c", "\x85", "\u2028", "\u3000", "\ufeff", "\ufffd", "▁", ESCAPE]
MARKS = ["<unk>", " <unk>", "▁<unk>", "<eos>", "<oov>", "<0x41>", "<0x0A>", ESCAPE + "0", ESCAPE + "1", "\u0301", "😀"]
PERIODS = st.tuples(st.text("ab0.= ", min_size=1, max_size=4), st.integers(1, 20)).map(lambda p: p[0] * p[1])
TEXTS = st.lists(
    st.one_of(st.sampled_from(STRANGE + MARKS + PLAIN.split(" ")[:40]), PERIODS, st.text(st.characters(codec="utf-8")))
).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """(dynlm's tokenizer, the one that AutoTokenizer loads)."""
    text, wanted = KINDS[request.param]
    tokenizer = train_tokenizer(TokenizerConfig(**wanted), [Article("a", "A", text)])
    folder = tmp_path_factory.mktemp("model")
    tokenizer.pretrained().save_pretrained(folder)
    return tokenizer, AutoTokenizer.from_pretrained(folder)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_every_text_has_the_same_ids(both, text):
    """The end of a line that a text does not have is dynlm's own; what is spelled in bytes comes back."""
    tokenizer, loaded = both
    ids = loaded(text)["input_ids"]
    assert ids + [tokenizer.eos_id] * (not text.endswith("\n")) == tokenizer.encode(text)
    if tokenizer.unk_id not in ids:
        assert loaded.decode(ids) + "\n" * (not text.endswith("\n")) == tokenizer.decode(tokenizer.encode(text))


def test_special_tokens_are_the_start_the_end_of_a_line_and_what_no_text_holds(both):
    tokenizer, loaded = both
    assert len(loaded) == tokenizer.vocab_size
    assert loaded.bos_token_id == loaded.eos_token_id == tokenizer.start_id == tokenizer.eos_id
    assert loaded.unk_token_id == tokenizer.unk_id
    assert (loaded.pad_token, loaded.pad_token_id) in [("<oov>", 0), ("<eos>", 0)]
    assert loaded("a\n", return_tensors="pt")["input_ids"][0, -1] == tokenizer.eos_id


def test_word_vocabulary_without_unk_has_none(tmp_path):
    tokenizer = train_tokenizer(TokenizerConfig(kind="word"), [Article("a", "A", "a cat\n")])
    tokenizer.pretrained().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("cat\na\n")["input_ids"] == tokenizer.encode("cat\na\n")
    assert loaded.unk_token is None
    with pytest.raises(Exception, match="UNK"):
        loaded("dog")


def test_wikitext2_is_read_alike(wikitext2):
    text = (wikitext2 / "wiki.valid.tokens").read_text(encoding="utf-8")[:200_000] + "\n"
    loaded, own = AutoTokenizer.from_pretrained(KIT / "model"), load_tokenizer(KIT / "tokenizer")
    assert loaded(text, verbose=False)["input_ids"] == own.encode(text)
