"""Words from tokens: which tokens a word owns, and its losses at the first, second and third occurrence."""

import pytest

from dynlm.report import words as module
from dynlm.report.words import Occurrences, Splitter, extremes, words_of


def losing(*texts):
    """Tokens with static losses 1, 2, 4, … and adapted ones of half."""
    return [(text, float(2**i), 2**i / 2) for i, text in enumerate(texts)]


def found(*texts):
    return [(word.text, word.static, word.mark) for word in words_of(losing(*texts))]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["Cor", "be", "au", "x"], [("Corbeaux", 15, False)]),
        ([" Cor", "beaux", ",", " and"], [("Corbeaux", 3, False), (",", 4, True), ("and", 8, False)]),
        (['"Cor', "beaux", ',"', "\n", "in"], [("Corbeaux", 3, False), (',"', 4, True), ("in", 16, False)]),
        (["don", "'", "t", " go"], [("don't", 7, False), ("go", 8, False)]),
        (["Ha", "ver", "'s", " x"], [("Haver", 3, False), ("x", 8, False)]),  # the possessive is not the name
        (["dogs", "’", " x"], [("dogs", 1, False), ("x", 4, False)]),
        (["well", "", "-", "", "known"], [("well", 1, False), ("-", 4, True), ("known", 16, False)]),
        (["caf", "é", "", " x"], [("café", 3, False), ("x", 8, False)]),
        (["日", "", "", "本"], [("日本", 15, False)]),  # the bytes of one character
        (["e", "\u0301t", "\u0301"], [("e\u0301t\u0301", 7, False)]),
        (["master", "_", "addr"], [("master_addr", 7, False)]),
        (["a,b", "c", " d"], [("a", 1, False), ("d", 4, False)]),  # "bc" begins in a token of "a"
        (["  ", "\n"], []),
        (["x" * 50, " y"], [("y", 2, False)]),
    ],
)
def test_a_token_belongs_to_the_word_of_its_first_letter(texts, expected):
    assert found(*texts) == expected


def test_words_come_out_the_same_token_by_token():
    tokens = losing("The", " Cor", "beaux", " of", " Quern", "moor", ".")
    splitter, words = Splitter(), []
    for token in tokens:
        words += splitter.add(*token)
    assert words + list(splitter.end()) == list(words_of(tokens))


def read(occurrences, *words):
    for text, static, adapted in words:
        occurrences.add([f" {text}"], [static], [adapted])
    occurrences.end_text()


def test_occurrences_are_told_in_order_and_chosen_by_static_alone():
    occurrences = Occurrences(keep=3)
    names = [("Quern", 9.0, 9.5), ("Quern", 8.0, 4.0), ("Quern", 7.0, 2.0), ("Quern", 7.0, 0.0)]
    worse = [("Worse", 20.0, 25.0)] * 3
    twice = [("Twice", 30.0, 0.0)] * 2
    read(occurrences, *names, *worse, *twice, ("Once", 40.0, 0.0), *[("the", 1.0, 0.1)] * 9, *[("42", 9.0, 1.0)] * 3)
    assert occurrences.rows() == [
        {"word": "Worse", "times": 3, "static": [20.0] * 3, "adapted": [25.0] * 3},
        {"word": "Quern", "times": 4, "static": [9.0, 8.0, 7.0], "adapted": [9.5, 4.0, 2.0]},
        {"word": "Twice", "times": 2, "static": [30.0] * 2, "adapted": [0.0] * 2},
    ]
    assert occurrences.mean() == {"words": 2, "static": [14.5, 14.0, 13.5], "adapted": [17.25, 14.5, 13.5]}


def test_each_text_has_first_occurrences_of_its_own():
    occurrences = Occurrences(keep=9)
    read(occurrences, *[("Name", 6.0, 1.0)] * 3)
    read(occurrences, *[("Name", 8.0, 2.0)] * 3, ("Other", 9.0, 9.0))
    read(occurrences, ("Other", 9.0, 9.0))
    assert occurrences.rows() == [{"word": "Name", "times": 3, "static": [8.0] * 3, "adapted": [2.0] * 3}]
    assert occurrences.mean() == {"words": 2, "static": [7.0] * 3, "adapted": [1.5] * 3}


def test_an_endless_stream_of_new_words_takes_bounded_memory(monkeypatch):
    monkeypatch.setattr(module, "DISTINCT", 50)
    occurrences = Occurrences(keep=5)
    tokens = [f" {letter * 3}{number}" for number in range(40) for letter in "abc"]
    for _ in range(3):
        occurrences.add(tokens, [9.0] * len(tokens), [1.0] * len(tokens))
    assert occurrences.limit == "only the first 50 different words of a text were followed"
    assert Occurrences(keep=5).limit == ""
    occurrences.end_text()
    assert len(occurrences.rows()) == 5
    assert occurrences.mean()["words"] == 50  # those that are followed are followed exactly
    occurrences.add(["x" * 10_000] * 100, [1.0] * 100, [1.0] * 100)
    assert sum(map(len, vars(occurrences._splitter).values())) < 200


def test_what_gained_and_lost_most_in_all_are_words():
    tokens = [(" Cor", 9.0, 1.0), ("beaux", 9.0, 1.0), (" the", 1.0, 2.0), (",", 2.0, 1.0), (" Cor", 9.0, 8.0)]
    assert extremes([*tokens, ("beaux", 9.0, 8.0)], keep=2) == {
        "gained": [("Corbeaux", 2, 18.0), (",", 1, 1.0)],
        "lost": [("the", 1, -1.0)],
    }
