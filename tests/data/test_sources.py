"""The same text in another form is the same articles: the hub's rows, Windows' line ends, names that tell splits."""

import json

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynlm.data.articles import DataConfig, load_corpus, read_pools
from dynlm.data.rows import split_of_name
from dynlm.data.tokenizers import SentencePieceTokenizer, TokenizerConfig, lost_share
from dynlm.types import InputError


def wikitext(names):
    return "".join(f" \n = {name} = \n \n Words about {name} , first . \n Second . \n" for name in names)


FILES = {"train": "ABCDEF", "valid": "GH", "test": "IJ"}


def rows_of(text):
    """As the hub has WikiText: a line a row, empty lines without their blank."""
    return ["" if line == " \n" else line for line in text.splitlines(keepends=True)]


@pytest.fixture
def expected(tmp_path):
    (tmp_path / "files").mkdir()
    for split, names in FILES.items():
        (tmp_path / "files" / f"wiki.{split}.tokens").write_text(wikitext(names))
    return read_pools(DataConfig(source=str(tmp_path / "files")))


NAMES = {"train": "train", "valid": "validation", "test": "test"}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "shards"])
def test_wikitext_with_a_line_a_row_gives_the_articles_and_splits_of_its_files(expected, tmp_path, kind):
    folder = tmp_path / "rows"
    folder.mkdir()
    for split, names in FILES.items():
        rows = rows_of(wikitext(names))
        if kind == "jsonl":
            lines = (json.dumps({"text": row}) for row in rows)
            (folder / f"{NAMES[split]}.jsonl").write_text("\n".join(lines))
            continue
        parts = [rows] if kind == "parquet" else [rows[:7], rows[7:]]  # cut inside an article
        for number, part in enumerate(parts):
            name = f"{NAMES[split]}-{number:05}-of-{len(parts):05}.parquet"
            datasets.Dataset.from_dict({"text": part}).to_parquet(folder / name)
    assert read_pools(DataConfig(source=str(folder / "*.*"))) == expected
    if kind != "jsonl":
        assert read_pools(DataConfig(source=f"hf:{folder}")) == expected


def test_wikitext_of_the_hub_is_that_of_the_real_file(wikitext2, tmp_path):
    text = (wikitext2 / "wiki.valid.tokens").read_text()
    path = tmp_path / "validation.parquet"
    datasets.Dataset.from_dict({"text": rows_of(text)}).to_parquet(path)
    found = read_pools(DataConfig(source=str(path)))["all"]
    real = read_pools(DataConfig(source=str(wikitext2 / "wiki.valid.tokens")))["all"]
    assert [(a.title, a.text) for a in found] == [(a.title, a.text) for a in real]
    assert len(found) == 60


@pytest.mark.parametrize("end", [".tokens", ".raw", ".txt"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_line_ends_of_windows_and_other_names_change_nothing(expected, tmp_path, end, newline):
    folder = tmp_path / "other"
    folder.mkdir()
    for split, names in FILES.items():
        (folder / f"wiki.{split}{end}").write_bytes(wikitext(names).replace("\n", newline).encode())
    assert read_pools(DataConfig(source=str(folder))) == expected
    assert read_pools(DataConfig(source=str(folder / f"wiki.train{end}")))["all"] == expected["train"]
    assert read_pools(DataConfig(source=str(folder / f"*{end}"))) == expected


@pytest.mark.parametrize(
    ("name", "split"),
    [("train-00000-of-00002.parquet", "train"), ("my_dev.jsonl", "valid"), ("Test.txt", "test"),
     ("training.txt", "train"), ("latest.jsonl", None), ("contrains.txt", None), ("wiki.valid.tokens", "valid")],
)  # fmt: skip
def test_splits_are_told_by_whole_words_of_a_name(name, split):
    assert split_of_name(name) == split


def test_names_tell_splits_only_where_all_do(tmp_path):
    for name in ("train.txt", "notes.txt"):
        (tmp_path / name).write_text("some text\n")
    assert set(read_pools(DataConfig(source=str(tmp_path / "*.txt")))) == {"all"}


@pytest.mark.parametrize("name", ["", "/nowhere/x/y", "a b", "../../nowhere", "user/name/config/more"])
def test_hub_sources_that_cannot_be_are_one_line(name):
    with pytest.raises(InputError, match="no folder, and no NAME") as caught:
        load_corpus(DataConfig(source=f"hf:{name}"))
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_loading_script_is_refused_and_not_run(tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(InputError, match="cannot be read"):
        load_corpus(DataConfig(source=f"hf:{folder}"))
    assert not (tmp_path / "ran").exists()


def test_json_lines_with_a_bom_deep_nesting_and_nul_bytes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\N{ZERO WIDTH NO-BREAK SPACE}" + json.dumps({"text": "one"}) + "\n", encoding="utf-8")
    assert read_pools(DataConfig(source=str(path)))["all"][0].text == "one\n"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="line 1: not JSON"):
        read_pools(DataConfig(source=str(path)))
    path.write_bytes("text".encode("utf-16-be"))
    with pytest.raises(InputError, match="NUL bytes"):
        read_pools(DataConfig(source=str(path)))


# tokenizers


@pytest.fixture(scope="module")
def tokenizer():
    text = "some words and a sign in them, the quick brown fox jumps over lazy dogs\n"
    return SentencePieceTokenizer.train([text * 50], TokenizerConfig(vocab_size=300))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60))
def test_every_text_comes_back_byte_for_byte(tokenizer, text):
    text += "\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["a ▁ b▁c\n", "▁\n", "\ue000\n", "\ue0001\ue0000 ▁\n"])
def test_the_sign_for_a_blank_is_a_sign_like_any_other(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert lost_share(tokenizer, [text]) == 0


class Lower:
    """A tokenizer that lowers case and drops ends of line."""

    def encode(self, text):
        return [ord(character) for character in text.lower().replace("\n", "")]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_the_share_that_a_tokenizer_loses():
    assert lost_share(Lower(), ["all lower case"]) == 0
    assert lost_share(Lower(), ["ABCDEfghij"]) == pytest.approx(0.5)
    assert lost_share(Lower(), ["abcdefghi\n"]) == pytest.approx(0.1)
