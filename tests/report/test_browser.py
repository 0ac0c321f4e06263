"""Both pages in a real browser: nothing fails, nothing is asked for, and what should move moves."""

from __future__ import annotations

import pytest

from dynlm.report.html import write_report
from dynlm.report.tokenmap import write_token_map
from tests import browser
from tests.support.evaluations import FakeRun, pieces
from tests.support.tokenmaps import MEAN, WORDS, make_map

pytestmark = pytest.mark.skipif(
    browser.find() is None, reason="no chromium on PATH: the pages were not tried in a browser"
)
PANEL = "document.getElementById('panel')"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    try:
        with browser.Browser(tmp_path_factory.mktemp("profile")) as page:
            yield page
    except browser.NoBrowser as error:
        pytest.skip(f"{error}: the pages were not tried in a browser")


@pytest.fixture
def page(opened):
    opened.complaints.clear()
    opened.requests.clear()
    opened.resize(1000, 900)
    opened.scheme("light")
    return opened


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    methods = ("static", "stateless", "rms", "cache", "gated", "gated+cache")
    return write_report(FakeRun(tmp_path_factory.mktemp("run"), methods, articles=10, reset="article"), pieces=pieces)


def test_the_report_complains_of_nothing_and_asks_for_nothing(page, report):
    page.open(report)
    assert page.complaints == []
    assert page.requests == [report.as_uri()]


def test_the_browser_sees_what_is_wrong(page, tmp_path):
    (tmp_path / "bad.html").write_text(
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\"><script>1</script><img src=x.png>"
    )
    page.open(tmp_path / "bad.html")
    assert len(page.complaints) == 2


def test_hover_shows_both_losses(page, report):
    page.open(report)
    assert page.evaluate(f"{PANEL}.hidden") is True
    page.hover("#map .tokens span[data-s]:nth-child(3)")
    text = page.evaluate(f"{PANEL}.textContent")
    assert "static " in text
    assert "gated " in text
    assert " nats = " in text
    assert page.evaluate(f"{PANEL}.hidden") is False


def test_another_method_colours_the_map_anew(page, report):
    page.open(report)
    before = page.evaluate("document.querySelector('#map .tokens').innerHTML")
    told = page.evaluate("document.querySelector('[data-gain]').textContent")
    pick = (
        "(() => {{ const choice = document.getElementById('{0}'); choice.value = '{1}';"
        "choice.dispatchEvent(new Event('change')); }})()"
    )
    page.evaluate(pick.format("pick-a", "static"))
    assert page.evaluate("document.querySelectorAll('#map .b1, #map .b2, #map .w1, #map .w2').length") == 0
    assert page.evaluate("document.querySelector('[data-gain]').textContent") == "+0.000"
    page.evaluate(pick.format("pick-a", "gated"))
    assert page.evaluate("document.querySelector('[data-gain]').textContent") == told
    tokens = "[...document.querySelectorAll('#map .tokens span')]"
    classes = f"{tokens}.map(e => [...e.classList].sort().join(' ')).join()"
    shades = page.evaluate(classes)
    page.open(report)
    assert page.evaluate("document.querySelector('#map .tokens').innerHTML") == before
    assert page.evaluate(classes) == shades  # the script and the writer of the page shade alike
    assert page.complaints == []


@pytest.mark.parametrize("width", [390, 1000])
def test_nothing_sticks_out_and_one_width_of_each_figure_is_shown(page, report, width):
    page.resize(width, 800)
    page.open(report)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown = "[...document.querySelectorAll('{}')].filter(e => e.getClientRects().length).length"
    wide, narrow = page.evaluate(shown.format(".wide-figure")), page.evaluate(shown.format(".narrow-figure"))
    assert (wide > 4, narrow > 4) == ((False, True) if width == 390 else (True, False))
    assert min(wide, narrow) == 0


def test_dark_pages_are_dark_and_their_ink_is_lstm(page, report):
    page.open(report)
    colours = (
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('svg text')).fill]"
    )
    light = page.evaluate(colours)
    page.scheme("dark")
    dark = page.evaluate(colours)
    assert light == ["rgb(255, 255, 255)", "rgb(27, 31, 36)"]
    assert dark == ["rgb(20, 23, 27)", "rgb(228, 231, 234)"]


def test_the_token_page_works_too(page, tmp_path):
    write_token_map(tmp_path / "page.html", make_map())
    page.open(tmp_path / "page.html")
    assert page.complaints == []
    assert page.requests == [(tmp_path / "page.html").as_uri()]
    page.hover("#map [data-s]")
    assert "adapted 3.000 nats" in page.evaluate(f"{PANEL}.textContent")
    page.evaluate("document.getElementById('map').focus()")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight")
    assert "tail" in page.evaluate(f"{PANEL}.textContent")


def test_what_scrolls_can_be_reached_with_the_keyboard(page, report, tmp_path):
    write_token_map(tmp_path / "page.html", make_map(words=WORDS, mean=MEAN))
    style = "getComputedStyle(e)"
    scrolls = f"['auto', 'scroll'].some(way => [{style}.overflowX, {style}.overflowY].includes(way))"
    for path in (report, tmp_path / "page.html"):
        for width in (390, 1000):
            page.resize(width, 800)
            page.open(path)
            too_large = "(e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1)"
            regions = f"[...document.body.querySelectorAll('*')].filter(e => {scrolls} && {too_large})"
            assert page.evaluate(f"{regions}.filter(e => e.tabIndex < 0).map(e => e.outerHTML.slice(0, 80))") == []


def test_the_table_of_words_fits_on_a_telephone(page, tmp_path):
    long = {"word": "LearnedOptimizerSettings", "times": 1234, "static": [68.2] * 3, "adapted": [43.9, 28.1, 16.4]}
    write_token_map(tmp_path / "page.html", make_map(words=[long, *WORDS], mean=MEAN))
    page.resize(390, 800)
    page.open(tmp_path / "page.html")
    box = "document.querySelector('.occurrences').parentElement"
    assert page.evaluate(f"{box}.scrollWidth <= {box}.clientWidth")


def test_tokens_without_characters_are_seen_and_leave_the_text_alone(page, tmp_path):
    texts = ["node", "", "_", "", "rank", "\n"]
    write_token_map(tmp_path / "page.html", make_map(texts, [("x", 0)]))
    page.open(tmp_path / "page.html")
    assert page.evaluate("document.querySelector('#map .tokens').innerText").strip() == "node_rank"
    assert page.evaluate("document.querySelector('#map .e').getBoundingClientRect().width") > 1
