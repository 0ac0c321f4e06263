"""Breakdowns against gains that are known by construction."""

import json
from collections import Counter

import pytest
import torch

from dynlm.data.tokenizers import TokenizerConfig, WordTokenizer, train_tokenizer
from dynlm.evaluation.breakdowns import ArticlesRead, break_down, gains, recovery
from dynlm.evaluation.calibration import Calibration
from dynlm.evaluation.stream import Scores, read_and_watch, read_articles
from dynlm.evaluation.words import KINDS, find_words, kind, token_texts
from dynlm.inner import InnerLoop, ReadConfig, Scored
from dynlm.optim.handmade import SGD, Static
from dynlm.types import Article, TokenizedArticle
from lab import START, VOCAB, make_article, make_lab

TEXT = " = Paris = \n In 1999 , the Mayor of Paris met Anna . The city was glad .\n"


def pair(text, tokenizer=None):
    tokenizer = tokenizer or WordTokenizer.train([text])
    article = Article("a", "A", text)
    return tokenizer, TokenizedArticle("a", "A", torch.tensor(tokenizer.encode(text)), article.n_words, article.n_bytes)


def reading(tokenizer, articles, counts=(), reset="article"):
    return ArticlesRead(articles, tokenizer, Counter(dict(counts)), 4, reset)


def test_words_are_runs_of_characters_and_tokens_find_theirs():
    tokenizer, article = pair(TEXT)
    words = find_words(tokenizer, article.ids_T)
    assert words.words == TEXT.split()
    assert words.word_T.count(-1) == 2  # two ends of line
    pieces = train_tokenizer(TokenizerConfig(vocab_size=300), [Article("a", "A", TEXT + "Ünï 日本 " * 3 + "\n")])
    ids = pieces.encode(TEXT + "Ünï 日 x\n")
    found = find_words(pieces, torch.tensor(ids))
    assert len(found.words) == len((TEXT + "Ünï 日 x\n").split())
    assert len(ids) > len(found.words) + 3
    assert found.words[: len(TEXT.split())] == TEXT.split()
    assert sorted(set(found.word_T)) == list(range(-1, len(found.words)))


@pytest.mark.parametrize(
    ("word", "first", "expected"),
    [
        ("Anna", False, "names"), ("Anna", True, "others"), ("The", False, "function words"),
        ("1999", True, "numbers"),
        ("@-@", False, "punctuation"), ("city,", False, "others"), ("(Paris)", False, "names"),
        ("<unk>", False, "others"), ("it's", False, "others"),
        ("'s", False, "function words"), ("...", False, "punctuation"),
    ],
)  # fmt: skip
def test_kinds_of_words(word, first, expected):
    assert kind(word, first) == expected


def test_a_sentence_opens_after_its_end_a_line_or_a_mark_that_opens_it():
    tokenizer, article = pair(TEXT)
    words = find_words(tokenizer, article.ids_T)
    opening = [word for word, first in zip(words.words, words.first, strict=True) if first]
    assert opening == ["=", "Paris", "In", "The"]


def test_every_breakdown_finds_its_tokens():
    tokenizer, article = pair(TEXT)
    n = len(article)
    words = find_words(tokenizer, article.ids_T)
    static = torch.full((n,), 3.0)
    names = [i for i, w in enumerate(words.word_T) if w >= 0 and kind(words.words[w], words.first[w]) == "names"]
    method = static.clone()
    method[names] -= 0.5
    scores = {"static": Scores([static, static], 1.0), "x": Scores([method, method], 1.0)}
    counts = {"Paris": 12, "the": 3000, ".": 200_000}
    found = break_down(scores, reading(tokenizer, [article, article], counts))
    kinds = {row["bin"]: row for row in found["vocabulary"]}
    assert {name: row["gain"]["x"]["mean"] for name, row in kinds.items()} == {
        name: 0.5 if name == "names" else 0.0 for name in KINDS
    }
    assert kinds["names"]["tokens"] == 2 * 3  # Mayor, the second Paris, Anna
    assert kinds["names"]["gain"]["x"]["ci95"] == [0.5, 0.5]
    frequency = {row["bin"]: row["tokens"] for row in found["train_frequency"]}
    assert frequency == {"0": 2 * 13, "10-99": 4, "1,000-9,999": 2, "100,000 and more": 4}
    occurrence = {row["bin"]: row["tokens"] for row in found["occurrence"]}
    assert occurrence == {"first": 2 * 15, "later": 2 * 3}  # =, Paris and . come again
    assert sum(row["tokens"] for row in found["relative_position"]) == 2 * n
    assert all(row["articles"] == 2 and row["static"] == 3.0 for row in found["relative_position"])
    assert "boundaries" not in found


def test_bins_weighted_with_their_tokens_sum_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    static, method = ([torch.rand(n, generator=generator) for n in (30, 50, 20)] for _ in range(2))
    classes = [torch.randint(-1, 4, (n,), generator=generator) for n in (30, 50, 20)]
    rows = gains({"static": Scores(static, 1.0), "x": Scores(method, 1.0)}, classes, "abcd")
    here = torch.cat(classes) >= 0
    expected = float((torch.cat(static) - torch.cat(method))[here].double().sum())
    assert sum(row["tokens"] * row["gain"]["x"]["mean"] for row in rows) == pytest.approx(expected)
    for row in rows:
        assert row["gain"]["x"]["ci95"][0] < row["gain"]["x"]["mean"] < row["gain"]["x"]["ci95"][1]


def test_recovery_counts_segments():
    assert recovery(torch.full((20,), 2.0), 4) == 1
    assert recovery(torch.tensor([9.0, 9.0] + [1.0] * 400), 2) == 133  # 1 + 16/n within 2 % of 1 + 16/402
    assert recovery(torch.linspace(2, 1, 9), 4) == 3  # the last, short segment


def test_a_stream_has_boundaries_and_interference():
    lab = make_lab(torch.float32)
    model, score, priors = lab
    articles = [make_article(50, seed) for seed in (1, 2, 1)]
    tokenizer = WordTokenizer(["<eos>", *map(str, range(1, VOCAB))])
    config = ReadConfig(segment=8, reset="never")
    scores = {
        name: read_and_watch(InnerLoop(model, score, rule, priors, config), articles, START)
        for name, rule in {"static": Static(), "sgd": SGD(1.0)}.items()
    }
    found = break_down(scores, reading(tokenizer, articles, reset="never")._replace(segment=8))
    json.dumps(found, allow_nan=False)
    assert [row["segment"] for row in found["boundaries"]["segments"]] == [1, 2, 3, 4, 5, 6, 7]
    assert found["boundaries"]["segments"][-1]["tokens"] == 2 * 2
    assert set(found["boundaries"]["recovery_segments"]) == {"static", "sgd"}
    sgd = found["interference"]["methods"]["sgd"]
    assert sgd["gain"] == pytest.approx(found["interference"]["static"] - sgd["again"])
    assert sgd["again"] < sgd["first_reading"]  # the last article was the first one again
    assert found["interference"]["segments"] == 7


def test_watching_changes_no_score():
    lab = make_lab(torch.float32)
    articles = [make_article(50, seed) for seed in (1, 2)]
    reader = InnerLoop(lab[0], lab[1], SGD(1.0), lab[2], ReadConfig(segment=8))
    watched, plain = read_and_watch(reader, articles, START), read_articles(reader, articles, START)
    assert all(torch.equal(a, b) for a, b in zip(watched.losses, plain.losses, strict=True))
    assert watched.again is None
    assert plain.calibration is None
    assert sum(b["tokens"] for b in watched.calibration["bins"]) == 100


def test_calibration_error_by_hand():
    calibration = Calibration()
    calibration.begin_article()
    probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.45, 0.55], [1.0, 0.0]])
    targets_S = torch.tensor([0, 1, 1, 0])
    calibration.scored(Scored(targets_S, targets_S, torch.zeros(4), 0.0, None, probs.log))
    found = calibration.summary()
    assert found["ece"] == pytest.approx((abs(1 - 1.5) + abs(1 - 0.55)) / 4)
    bins = [(b["from"], b["tokens"], b["accuracy"]) for b in found["bins"]]
    assert bins == [(0.5, 1, 1.0), (0.7, 2, 0.5), (0.9, 1, 1.0)]
    assert found["ci95"] == pytest.approx([found["ece"]] * 2)


def test_tokens_of_a_hub_tokenizer_keep_their_spaces(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "▁a", "▁The", "▁cat", "▁s", "at", "."]  # as Llama's: the decoder drops a text's first space
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<s>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(tmp_path)
    tokenizer = train_tokenizer(TokenizerConfig(kind="huggingface", name=str(tmp_path)), [])
    tokenizer.encode = lambda text: [1]  # "a"
    ids = [2, 3, 4, 5, 6]
    assert token_texts(tokenizer, ids) == [" The", " cat", " s", "at", "."]
    found = find_words(tokenizer, torch.tensor(ids))
    assert (found.words, found.word_T) == (["The", "cat", "sat."], [0, 1, 2, 2, 2])
