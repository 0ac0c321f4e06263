"""Tokenizers: nothing lost, everything counted."""

import pytest

from dynlm.data.articles import DataConfig, load_corpus
from dynlm.data.tokenizers import TokenizerConfig, WordTokenizer, load_tokenizer, tokenize, train_tokenizer
from dynlm.types import Article, InputError

TEXT = " The <unk> cat , on 3 @-@ 4 mats . \n \n" + "".join(
    f" The cat number {n} sat on the mat . \n" for n in range(40)
)
ARTICLES = [Article("a", "A", TEXT)]


def trained(kind, **settings):
    return train_tokenizer(TokenizerConfig(kind=kind, **settings), ARTICLES)


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_sentencepiece_round_trip_is_lossless(byte_fallback):
    tokenizer = trained("sentencepiece", vocab_size=330 if byte_fallback else 70, byte_fallback=byte_fallback)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert "".join(tokenizer.pieces(tokenizer.encode(TEXT))) == TEXT
    assert tokenizer.encode(TEXT).count(tokenizer.eos_id) == TEXT.count("\n")
    assert " <unk>" in tokenizer.pieces(tokenizer.encode(TEXT))


def test_byte_fallback_spells_what_training_never_saw():
    tokenizer = trained("sentencepiece", vocab_size=330)
    text = "naïve 日本 \t  spaces  \r\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_blanks_come_back_where_training_saw_none():
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=265), [Article("a", "A", "日本語日本\n語日本語\n" * 9)])
    assert tokenizer.decode(tokenizer.encode("日 本▁\n")) == "日 本▁\n"


def test_words_and_lines_survive_the_word_tokenizer():
    tokenizer = trained("word")
    decoded = tokenizer.decode(tokenizer.encode(TEXT))
    assert [line.split() for line in decoded.split("\n")] == [line.split() for line in TEXT.split("\n")]
    assert len(tokenizer.encode(TEXT)) == ARTICLES[0].n_words
    assert tokenizer.pieces(tokenizer.encode("unheard-of cat\n")) == ["<unk> ", "cat ", "\n"]


def test_word_vocabulary_without_unk_names_the_unseen_word():
    with pytest.raises(InputError, match="'dog' is not in the vocabulary"):
        WordTokenizer.train(["a cat\n"]).encode("a dog\n")


def test_wikitext2_word_vocabulary_and_sums(wikitext2):
    corpus = load_corpus(DataConfig(source=str(wikitext2)))
    tokenizer = train_tokenizer(TokenizerConfig(kind="word"), corpus.train + corpus.meta)
    assert tokenizer.vocab_size == 33_278
    valid = tokenize(tokenizer, corpus.valid)
    assert sum(map(len, valid)) == sum(a.n_words for a in valid) == 217_646
    assert sum(a.n_bytes for a in valid) == 1_121_681


@pytest.mark.parametrize("kind", ["word", "sentencepiece"])
def test_saved_tokenizers_come_back_the_same(tmp_path, kind):
    tokenizer = trained(kind, vocab_size=330)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert (again.vocab_size, again.start_id) == (tokenizer.vocab_size, tokenizer.start_id)


def test_any_hugging_face_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "The": 1, "cat": 2, "<unk>": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>").save_pretrained(
        tmp_path / "hf"
    )
    tokenizer = trained("huggingface", name=str(tmp_path / "hf"))
    assert tokenizer.encode("The cat") == [1, 2]
    assert (tokenizer.vocab_size, tokenizer.start_id) == (4, 0)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("The cat") == [1, 2]


def test_errors_are_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="could not make 100000 pieces"):
        trained("sentencepiece", vocab_size=100_000)
    with pytest.raises(InputError, match="cannot be loaded"):
        trained("huggingface", name=str(tmp_path / "nowhere"))
    tokenizer = trained("sentencepiece", vocab_size=330)
    tokenizer.save(tmp_path)
    (tmp_path / "sentencepiece.model").write_bytes(b"cut")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"kind": "clay"}')
    with pytest.raises(InputError, match="unknown kind 'clay'"):
        load_tokenizer(tmp_path)
