"""Sources and splits: what is read, what adds up, what is refused."""

import json

import pytest

from dynlm.data import stdlib
from dynlm.data.articles import SPLITS, DataConfig, load_corpus, read_pools
from dynlm.data.wikitext import split_articles
from dynlm.types import InputError

WIKI = (
    " \n = First = \n \n Some words here . \n = Played , W = \n more \n \n = = Section = = \n \n end \n \n"
    " = Second article = \n \n text \n"
)


def test_articles_partition_the_text_and_legends_are_not_titles():
    articles = split_articles(WIKI, "wiki.train")
    assert [a.title for a in articles] == ["First", "Second article"]
    assert "".join(a.text for a in articles) == WIKI
    assert articles[1].id == "wiki.train:1"


def test_text_without_titles_gives_no_article():
    assert split_articles("no title\n", "x") == []


def test_words_count_one_end_of_line_a_line():
    (article,) = split_articles(" \n = T = \n \n a b c \n", "x")
    assert article.n_words == 3 + 3 + 4  # "= T =", "a b c", four lines
    assert article.n_bytes == len(b" \n = T = \n \n a b c \n")


def test_wikitext2_gives_the_published_counts(wikitext2):
    corpus = load_corpus(DataConfig(source=str(wikitext2)))
    assert [len(getattr(corpus, name)) for name in SPLITS] == [540, 60, 60, 0]
    train = [*corpus.train, *corpus.meta]
    assert sum(a.n_words for a in train) == 2_088_628
    assert sum(a.n_words for a in corpus.valid) == 217_646
    files = [(train, "train"), (corpus.valid, "valid")]
    for articles, name in files:
        assert sum(a.n_bytes for a in articles) == (wikitext2 / f"wiki.{name}.tokens").stat().st_size
    assert not {a.id for a in corpus.train} & {a.id for a in corpus.meta}


def test_meta_split_is_deterministic_and_depends_on_the_seed(wikitext2):
    def meta(seed):
        return [a.id for a in load_corpus(DataConfig(source=str(wikitext2), split_seed=seed)).meta]

    assert meta(0) == meta(0)
    assert meta(0) != meta(1)


def test_environment_variables_are_expanded_and_an_unset_one_is_named(monkeypatch, tmp_path):
    (tmp_path / "wiki.valid.tokens").write_text(WIKI)
    monkeypatch.setenv("SOME_TEXT", str(tmp_path))
    assert len(load_corpus(DataConfig(source="$SOME_TEXT")).valid) == 2
    monkeypatch.delenv("SOME_TEXT")
    with pytest.raises(InputError, match=r"\$SOME_TEXT is not set"):
        load_corpus(DataConfig(source="$SOME_TEXT"))


def test_stdlib_reads_docstrings_and_topics_without_running_anything(tmp_path):
    (tmp_path / "pydoc_data").mkdir()
    topics = {"assert": "The assert statement.\n" * 60, "short": "no"}
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")
    code = 'raise SystemExit\ndef f():\n    """Docs of f."""\n    def g():\n        "Of g."\n'
    source = f'"""{"Module text. " * 100}"""\n{code}'
    (tmp_path / "module.py").write_text(source)
    (tmp_path / "broken.py").write_text("def (:\n")
    articles = {a.title: a.text for a in stdlib.load_articles(tmp_path)}
    assert set(articles) == {"assert", "module"}
    assert articles["module"].index("Module text.") < articles["module"].index("f\nDocs of f.")
    assert "g\nOf g." in articles["module"]


def test_stdlib_of_this_python_is_a_corpus():
    corpus = load_corpus(DataConfig())
    assert len(corpus.train) > 100
    assert len(corpus.valid) == len(corpus.test) == 24
    ids = [a.id for name in SPLITS for a in getattr(corpus, name)]
    assert len(ids) == len(set(ids))


def test_a_corpus_is_named_by_its_source_with_settings_of_its_own(tmp_path):
    for number in range(16):
        (tmp_path / f"{number}.txt").write_text(f"text {number}\n")
    corpus = load_corpus(f"{tmp_path}/*.txt", meta_articles=3, held_out=2)
    assert [len(getattr(corpus, name)) for name in SPLITS] == [9, 3, 2, 2]
    assert corpus == load_corpus(DataConfig(f"{tmp_path}/*.txt", meta_articles=3), held_out=2)
    with pytest.raises(InputError, match="did you mean 'held_out'"):
        load_corpus(f"{tmp_path}/*.txt", heldout=2)


def test_empty_library_folder_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no documentation found"):
        stdlib.load_articles(tmp_path)


def test_text_jsonl_and_parquet_files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo")
    rows = [{"text": "first", "title": "F"}, {"text": "second\n"}, {"text": "  "}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x y"]}), tmp_path / "c.parquet")
    (text,) = read_pools(DataConfig(source=str(tmp_path / "a.txt")))["all"]
    assert (text.title, text.text) == ("a", "one\r\ntwo\n")
    rows_read = read_pools(DataConfig(source=str(tmp_path / "b.jsonl")))["all"]
    assert [(a.title, a.text) for a in rows_read] == [("F", "first\n"), ("b 1", "second\n")]
    (row,) = read_pools(DataConfig(source=str(tmp_path / "*.parquet"), text_column="body"))["all"]
    assert row.text == "x y\n"


def test_hub_data_sets_come_through_datasets(tmp_path, monkeypatch):
    import datasets

    def fake(path, configuration):
        assert (path, configuration) == ("Salesforce/wikitext", "wikitext-2-v1")
        rows = ["" if not line.strip() else line + "\n" for line in WIKI.split("\n")[:-1]]
        return {"train": datasets.Dataset.from_dict({"text": rows})}

    monkeypatch.setattr(datasets, "load_dataset", fake)
    articles = read_pools(DataConfig(source="wikitext-2"))["all"]
    assert "".join(a.text for a in articles) == WIKI


def test_unreachable_data_set_is_one_clear_line(monkeypatch):
    import datasets

    def offline(path, configuration):
        raise ConnectionError(f"Couldn't reach {path}\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"'some/where' cannot be read \(Couldn't reach some/where\)"):
        read_pools(DataConfig(source="hf:some/where"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "file does not exist"),
        ("*.txt", None, "glob matches no file"),
        ("empty.txt", b"", "holds no article"),
        ("x.csv", b"a", "unknown ending '.csv'"),
        ("bad.txt", b"ok \xff", r"not UTF-8 \(byte 3\)"),
        ("bad.jsonl", b"{not json}\n", "line 1: not JSON"),
        ("list.jsonl", b"[1]\n", "line 1: a list, expected an object"),
        ("column.jsonl", b'{"body": "x"}\n', r"no text in column 'text' \(columns: body\)"),
        ("bad.parquet", b"PAR1", "not a readable parquet file"),
        ("no.tokens", b"plain\n", "no WikiText title line"),
    ],
)
def test_bad_sources_are_one_clear_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_corpus(DataConfig(source=str(tmp_path / name)))


def test_folder_without_wikitext_files(tmp_path):
    with pytest.raises(InputError, match=r"holds no wiki\.train\.tokens"):
        load_corpus(DataConfig(source=str(tmp_path)))


def test_unknown_and_empty_splits(tmp_path):
    (tmp_path / "wiki.valid.tokens").write_text(WIKI)
    corpus = load_corpus(DataConfig(source=str(tmp_path)))
    with pytest.raises(InputError, match="unknown split 'dev'"):
        corpus.split("dev")
    with pytest.raises(InputError, match=r"'test' of this source holds no article: .* are valid"):
        corpus.split("test")


def test_fingerprint_follows_the_text(tmp_path):
    path = tmp_path / "wiki.valid.tokens"
    path.write_text(WIKI)
    first = load_corpus(DataConfig(source=str(tmp_path))).fingerprint
    path.write_text(WIKI.replace("end", "END"))
    assert load_corpus(DataConfig(source=str(tmp_path))).fingerprint != first
