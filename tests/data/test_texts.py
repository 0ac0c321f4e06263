"""A user's own texts: every kind of file, every bad one, and tokens that give the text back."""

import io
import json

import pytest

from dynlm.data.texts import LONG_LINE, as_texts, encode_chunk, read_texts, surfaces
from dynlm.data.tokenizers import SentencePieceTokenizer, TokenizerConfig, WordTokenizer
from dynlm.types import InputError

PROSE = "The quick brown fox jumps over the lazy dog , again and again .\nIt never tires of that .\n"
HTML = """<!DOCTYPE html><html><head><title>A &amp; B</title><style>p { color: red }</style>
<script>if (a < b) { alert("no") }</script></head><body><h1>Head</h1><p>One <b> bold</b>
word &mdash; caf&eacute;.<p>Two<br>lines<pre>    kept  as is</pre><template>hidden</template></body></html>"""


def texts(*paths, stdin=None):
    return [text.article() for text in read_texts([str(p) for p in paths], stdin)]


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "README", "a.log"])
def test_plain_text_is_read_as_it_stands_and_ends_with_a_newline(tmp_path, name):
    (article,) = texts(put(tmp_path / name, "one\r\ntwo"))
    assert article.text == "one\ntwo\n"
    assert article.title == name
    (article,) = texts(put(tmp_path / name, b"\xef\xbb\xbfone\n"))
    assert article.text == "one\n"


@pytest.mark.parametrize("name", ["a.html", "a.HTM"])
def test_html_gives_its_visible_text(tmp_path, name):
    (article,) = texts(put(tmp_path / name, HTML))
    assert article.title == "A & B"
    assert article.text == "Head\nOne bold word — café.\nTwo\nlines\n    kept  as is\n"


def test_json_lines_give_an_article_a_line(tmp_path):
    rows = [{"text": "one", "title": "T"}, {"text": " "}, {"text": "two\ud800\n"}]
    a, b = texts(put(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows))))
    assert (a.title, a.text, b.title, b.text) == ("T", "one\n", "a 5", "two\ufffd\n")


class Slow(io.BytesIO):
    """A pipe: gives one line at a time."""

    def read1(self, size=-1):
        return self.readline()


def test_standard_input_is_read_as_it_comes():
    pipe = Slow(b"one\ntwo \xc3\xa9\nthree")
    (text,) = read_texts(["-"], pipe)
    assert next(text.chunks) == "one\n"
    assert pipe.tell() == 4
    assert list(text.chunks) == ["two é\n", "three\n"]


def test_invalid_utf8_is_replaced_and_noted(tmp_path):
    (text,) = read_texts([str(put(tmp_path / "a.txt", b"caf\xe9 and \xff\xfe more, \xef\xbf\xbd was there"))])
    assert text.article().text == "caf\ufffd and \ufffd\ufffd more, \ufffd was there\n"
    assert len(text.notes) == 1
    assert "3 bytes not UTF-8" in text.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t\n", "is empty"),
        ("a.html", b"<script>x</script>", "no text outside tags"),
        ("a.html", b"", "is empty"),
        ("a.jsonl", b"\n", "no line with a text"),
        ("a.jsonl", b'{"text": ""}', "no line with a text"),
        ("a.jsonl", b'{"text": "a"}\n{oops', "line 2: not JSON"),
        ("a.jsonl", b'{"body": "a"}', 'line 1: expected an object with a string under "text"'),
        ("a.jsonl", b"[1]", "line 1: expected an object"),
        ("a.pdf", b"%PDF \0\1\2", "is binary"),
        ("a.txt", bytes(range(1, 9)) * 9 + b"letters", "is binary"),
        ("a.txt", "größer".encode("utf-16"), "is binary"),
        ("a.txt", bytes(range(128, 255)), "not UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_file_is_one_clear_line(tmp_path, name, content, part):
    with pytest.raises(InputError, match=r"^[^\n]+$") as error:
        texts(put(tmp_path / name, content))
    assert part in str(error.value)
    assert name in str(error.value)


def test_bad_names_are_told_before_anything_is_read(tmp_path):
    for names, part in (
        ([], "no text to read"),
        (["-", "-"], "only once"),
        ([str(tmp_path)], "is a folder"),
        ([str(put(tmp_path / "a.txt", "a")), str(tmp_path / "b.txt")], "b.txt does not exist"),
    ):
        with pytest.raises(InputError, match=part):
            read_texts(names)


def test_one_line_of_a_megabyte_is_cut_before_blanks(tmp_path):
    source = "word another " * 80000
    (text,) = read_texts([str(put(tmp_path / "a.txt", source))])
    chunks = list(text.chunks)
    assert "".join(chunks) == source + "\n"
    assert max(map(len, chunks)) <= LONG_LINE
    assert all(chunk.startswith(" ") for chunk in chunks[1:])
    (text,) = read_texts([str(put(tmp_path / "a.txt", "x" * 1_000_000))])
    chunks = list(text.chunks)
    assert "".join(chunks) == "x" * 1_000_000 + "\n"
    assert max(map(len, chunks)) <= LONG_LINE + 1


@pytest.fixture(scope="module", params=["plain", "bytes", "word"])
def tokenizer(request):
    if request.param == "word":
        return WordTokenizer.train([PROSE, "<unk>"])
    sizes = {"vocab_size": 310, "byte_fallback": True} if request.param == "bytes" else {"vocab_size": 50}
    config = TokenizerConfig(**{"byte_fallback": False, **sizes})
    return SentencePieceTokenizer.train([PROSE * 20], config)


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "  two  blanks and\ttabs  \n\n\nfox 😀😀 dog 日本 ▁x É<unk> .\n",
        "日本語\n",
        "<0x41> <oov> again\n",
        " \n",
    ],
    ids=["prose", "unknown", "one unknown", "looks like bytes", "blank"],
)
def test_stretches_of_tokens_give_the_text_back(tokenizer, text):
    pieces = tokenizer.pieces(tokenizer.encode(text))
    found = surfaces(pieces, text)
    assert len(found) == len(pieces)
    assert "".join(found) == text


def test_stretches_are_what_the_tokens_say(tokenizer):
    pieces = tokenizer.pieces(tokenizer.encode(PROSE))
    found = surfaces(pieces, PROSE)
    assert [a.strip(" ") for a in found] == [b.strip(" ") for b in pieces]


def test_an_unknown_character_stands_for_itself():
    tokenizer = SentencePieceTokenizer.train([PROSE * 20], TokenizerConfig(vocab_size=50, byte_fallback=False))
    text = "a 😀😀 b\n"
    found = surfaces(tokenizer.pieces(tokenizer.encode(text)), text)
    assert found[found.index("😀😀") + 1 :][-1] == "\n"


def test_chunks_have_the_tokens_of_the_whole(tokenizer):
    chunks = ["The quick", " brown fox", " jumps over\n", "It never", " tires .\n"]
    if isinstance(tokenizer, WordTokenizer):
        chunks = ["The quick", " fox\n"]
    ids = [i for chunk in chunks for i in encode_chunk(tokenizer, chunk)]
    assert ids == tokenizer.encode("".join(chunks))


@pytest.mark.parametrize("text", ["It went on. " * 30, "on/and/on " * 60, "a\0b"])
def test_a_line_that_no_file_can_be_called_is_a_text(text):
    """A file system knows no name of 300 characters, and says so with an error of its own."""
    (found,) = as_texts(text)
    assert found.article().text.rstrip("\n") == text.replace("\0", "\N{REPLACEMENT CHARACTER}")
