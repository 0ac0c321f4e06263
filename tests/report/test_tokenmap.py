"""The page of tokens: complete, self-contained, every token once and in order."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from dynlm.report import page
from dynlm.report.shades import THRESHOLDS, label, shade
from dynlm.report.tokenmap import render, write_token_map
from tests.support.tokenmaps import MEAN, TEXTS, WORDS, make_map

VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Tags, attributes, and the tokens with their texts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.tokens: list[tuple[str, dict[str, str | None]]] = []
        self.inside = False
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        self.inside = "data-s" in dict(attrs)
        if self.inside:
            self.tokens.append(("", dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            text, attributes = self.tokens[-1]
            self.tokens[-1] = (text + data, attributes)


def test_the_page_is_well_formed_and_loads_nothing():
    source = render(make_map(words=WORDS, mean=MEAN, note="Note"))
    tree = Page(source)
    assert source.startswith("<!DOCTYPE html>")
    assert tree.open == []
    assert not {"img", "iframe", "object", "embed", "base", "form"} & set(tree.tags)
    assert tree.tags.count("script") == 1
    loads = {value for key, value in tree.attributes if key in ("src", "href", "xlink:href", "srcset", "data")}
    assert all(value.startswith("#") or value == "data:," for value in loads)
    assert not re.search(r"https?://|@import|url\((?!#)", source)
    assert not any(key.startswith("on") for key, _ in tree.attributes)
    ids = [value for key, value in tree.attributes if key == "id"]
    assert len(ids) == len(set(ids))


def test_only_the_page_s_own_script_may_run():
    source = render(make_map())
    script = re.search(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in source.replace(
        "&#39;", "'"
    )


def test_every_token_is_there_once_in_order_with_its_losses():
    shown = make_map()
    shown_tokens = Page(render(shown)).tokens
    assert [text for text, _ in shown_tokens] == TEXTS
    for (_, attributes), static, adapted in zip(shown_tokens, shown.static_T, shown.adapted_T, strict=True):
        assert float(attributes["data-s"]) == pytest.approx(static, abs=6e-4)
        assert float(attributes["data-a"]) == pytest.approx(adapted, abs=6e-4)
    kinds = [(attributes.get("class") or "").split() for _, attributes in shown_tokens]
    assert kinds[0] == ["w4"]
    assert kinds[-1] == ["b4", "n"]
    assert kinds[5][-1] == "e"


def test_totals_titles_and_settings_are_told():
    source = render(make_map())
    parts = ("One &amp; &lt;two&gt;", "Second", "4 words in 2 lines", "0123abcd", "rule: lr", "0.002", "gated")
    for part in (*parts, "<strong>0.242</strong>", "bits per byte; 3.00 nats per token"):
        assert part in source
    assert "Note:" not in source
    assert "Words that came again" not in source


def test_a_perplexity_is_told_where_it_says_something():
    assert "perplexity" not in render(make_map())  # static's is beyond all numbers
    assert "perplexity" not in render(make_map(static_perplexity=792_896_221.84))
    source = render(make_map(static_perplexity=4189.3))
    assert "word perplexity 4,190" in source
    assert "word perplexity 12.5" in source


def test_words_come_first_with_their_occurrences_in_order():
    source = render(make_map(words=WORDS, mean=MEAN, note="This text is far <away>", limit="only few"))
    rows = re.findall(r'<tr[^>]*><th scope="row">([^<]+)</th><td>(\d*)</td>(.*?)</tr>', source, re.DOTALL)
    cells = {word: (times, re.findall(r"<td>(.*?)</td>", pairs)) for word, times, pairs in rows}
    assert cells["Quern&lt;moor"] == ("6", ["39.7&nbsp;→ 39.7", "39.7&nbsp;→ 39.7", "42.2&nbsp;→ 8.5"])
    assert cells["charter"] == ("2", ["10.5&nbsp;→ 10.7", "9.8&nbsp;→ 8.1", ""])
    assert cells["mean of 3 words"] == ("", ["35.2&nbsp;→ 35.2", "37.2&nbsp;→ 31.9", "36.7&nbsp;→ 11.3"])
    assert "occurrence 3 of “Quern&lt;moor” 4.37 × 10¹⁴ × likelier than static did" in source
    assert "This text is far &lt;away&gt;" in source
    assert "(Here only few.)" in source
    places = [source.index(f"<h2>{title}") for title in ("Words that came", "Where it came", "Gain along", "Token by")]
    assert places == sorted(places)


def test_a_token_without_characters_puts_none_on_the_page():
    """It is a bar; a sign would look like part of the text."""
    rules = re.findall(r"^\.e\b.*$", page.resource("style.css"), re.MULTILINE)
    assert rules
    assert not any("content" in rule for rule in rules)


def test_equal_numbers_give_equal_bytes(tmp_path):
    for name in "ab":
        write_token_map(tmp_path / name, make_map())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_hundred_thousand_tokens_stay_below_15_megabytes():
    source = render(make_map([" token"] * 100_000, [("long", 0)]))
    assert len(source.encode()) < 15e6


def test_shades_rise_with_the_gain():
    assert [shade(g) for g in (-9, -1.5, -0.7, -0.2, 0, 0.05, 0.2, 0.7, 1.5, 9)] == [-4, -3, -2, -1, 0, 0, 1, 2, 3, 4]
    assert label(0) == f"within {THRESHOLDS[0]:g}"
    assert label(1) == "+0.1 to +0.5"
    assert label(-4) == "beyond \N{MINUS SIGN}2"
