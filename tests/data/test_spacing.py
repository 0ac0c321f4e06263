"""WikiText's spacing: what it looks like, that nothing of the text is lost, and that chunks change nothing."""

import pytest

from dynlm.data.spacing import Spacer, spaced_word
from dynlm.data.texts import encode_chunk, surfaces
from dynlm.data.tokenizers import SentencePieceTokenizer, TokenizerConfig

PROSE = """The “well-known” author (born 1990) sold 2,000.5 copies; it's O'Brien's, isn't it?

\tHe said, "Don't!" and paid $5 -- or 50% -- at 10:30 in the U.S. and/or elsewhere...  Dr. Who's dogs' 'bowls'.
* A_b, c.d: <unk> e.g. [1]. End.
"""
SPACED = (
    """ The " well @-@ known " author ( born 1990 ) sold 2 @,@ 000 @.@ 5 copies ; it 's O 'Brien 's , isn 't it ? \n"""
    """ \n He said , " Don 't ! " and paid $ 5 -- or 50 % -- at 10 : 30 in the U.S. and / or elsewhere ..."""
    """ Dr. Who 's dogs ' ' bowls ' . \n * A _ b , c.d : <unk> e.g. [ 1 ] . End . \n"""
)


def spaced(text, **settings):
    return Spacer(**settings)(text)


def test_marks_are_set_apart_as_in_wikitext():
    assert spaced(PROSE).text == SPACED
    assert spaced(SPACED).text == SPACED


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("plain", "plain"),
        ("Mr.", "Mr."),
        ("A.", "A."),
        ("U.S.,", "U.S. ,"),
        ("end.)", "end . )"),
        ("@-@", "@-@"),
        ("--", "--"),
        ("'Brien", "'Brien"),
        ("'re", "'re"),
        ("-5", "- 5"),
        ("a@b.org", "a@b.org"),
        ("3.11.2", "3 @.@ 11 @.@ 2"),
        ("state-of-the-art", "state @-@ of @-@ the @-@ art"),
        ("etc.).", "etc. ) ."),
        ("क्या", "क्या"),
        (".", "."),
    ],
)
def test_single_words(word, expected):
    assert spaced_word(word) == expected
    assert all(spaced_word(part) == part for part in expected.split())


@pytest.mark.parametrize("auto", [True, False])
def test_chunks_change_nothing_and_nothing_is_lost(auto):
    whole = spaced(PROSE, auto=auto)
    blanks = [i for i, c in enumerate(PROSE) if c.isspace()]
    for at in blanks:
        spacer = Spacer(auto)
        parts = [spacer(part) for part in (PROSE[:at], PROSE[at:]) if part]
        assert "".join(part.text for part in parts) == whole.text
        assert all("".join(part.originals(list(part.text))) == part.source for part in parts)


def test_auto_leaves_what_is_spaced_already():
    bare = "A line , of this kind .\nNo mark here\nIt ( a dog ) ran .\nCode: f(x), g(y);\n"
    assert spaced(bare, auto=True).text == bare.replace("\nNo", "\nNo")
    assert spaced(bare).text != bare
    assert spaced("One ( odd ) line\n" + PROSE * 2, auto=True).text.endswith(SPACED)
    assert spaced(SPACED * 3, auto=True).text == SPACED * 3


def test_tokens_stand_for_stretches_of_the_text_as_it_was():
    config = TokenizerConfig(vocab_size=330)
    tokenizer = SentencePieceTokenizer.train([SPACED * 20], config)
    found = spaced(PROSE)
    ids = encode_chunk(tokenizer, found.text)
    stretches = found.originals(surfaces(tokenizer.pieces(ids), found.text))
    assert len(stretches) == len(ids)
    assert "".join(stretches) == PROSE
    assert {"-", "“", "\n"} <= {stretch.strip(" \t") for stretch in stretches}


def test_wikitext_itself_stays_as_it_is(wikitext2):
    text = (wikitext2 / "wiki.valid.tokens").read_text(encoding="utf-8")
    assert spaced(text).text == text
    words = set((wikitext2 / "wiki.train.tokens").read_text(encoding="utf-8").split())
    changed = {word for word in words if spaced_word(word) != word}
    assert len(changed) < 2e-3 * len(words), sorted(changed)
