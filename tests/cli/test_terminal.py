"""Colours on every terminal: the largest gain stands out most, and nothing of a text controls the terminal."""

import io
import re

import pytest

from dynlm.cli.terminal import Screen, color_depth, palette
from dynlm.printable import printable
from dynlm.report.shades import DARK, LIGHT, contrast, cube, ink, style

BACKGROUNDS = [(LIGHT, (255, 255, 255)), (DARK, (0, 0, 0)), (DARK, (30, 30, 30))]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_are_chosen_by_flag_terminal_and_environment():
    plain, rich = {"TERM": "xterm"}, {"TERM": "xterm", "COLORTERM": "truecolor"}
    assert [color_depth("auto", t, e) for t, e in ((True, plain), (True, rich), (False, rich))] == [8, 24, 0]
    assert color_depth("auto", True, rich | {"NO_COLOR": "1"}) == 0
    assert color_depth("auto", True, {"TERM": "dumb"}) == 0
    assert color_depth("always", False, rich | {"NO_COLOR": "1"}) == 24
    assert color_depth("never", True, rich) == 0


def test_control_sequences_of_a_text_do_not_reach_a_terminal():
    for color in ("never", "always"):
        screen = Screen(out := Terminal(), color)
        screen.tokens(["\x1b[2J", "fine\n"], [3.0, 0.0])
        assert "\x1b[2J" not in out.getvalue()
        assert "fine\n" in out.getvalue()


@pytest.mark.parametrize(("colors", "background"), BACKGROUNDS)
@pytest.mark.parametrize("side", ["better", "worse"])
def test_a_larger_gain_stands_out_more(colors, background, side):
    for papers in (getattr(colors, side), [cube(code) for code in getattr(colors, f"{side}_256")]):
        salience = [contrast(paper, background) for paper in papers]
        assert salience == sorted(salience)
        assert salience[-1] > 7  # the strongest cannot be missed
        assert salience[-1] > 2 * salience[-2]


@pytest.mark.parametrize("colors", [LIGHT, DARK])
@pytest.mark.parametrize("depth", [8, 24])
def test_text_on_every_shade_is_legible_and_no_theme_changes_it(colors, depth):
    for level in (-4, -3, -2, -1, 1, 2, 3, 4):
        begin = style(level, depth, colors)
        front, kind, paper = re.fullmatch(r"\x1b\[38;5;(\d+);48;([25]);([\d;]+)m", begin).groups()
        numbers = tuple(map(int, paper.split(";")))
        color = numbers if kind == "2" else cube(*numbers)
        assert (kind == "2") == (depth == 24)
        assert int(front) in (16, 231)
        assert kind == "2" or numbers[0] >= 16  # the first 16 follow the theme
        assert contrast(cube(int(front)), color) >= 4.5
        assert ink(color) == int(front)


def test_the_theme_is_the_flag_s_or_the_terminal_s_background():
    assert palette("light", {"COLORFGBG": "15;0"}) is LIGHT
    assert palette("dark", {"COLORFGBG": "0;15"}) is DARK
    told = {"15;0": DARK, "0;15": LIGHT, "0;default;7": LIGHT, "12;8": DARK, "default;default": DARK, "": DARK}
    assert {value: palette("auto", {"COLORFGBG": value}) for value in told} == told
    assert palette("auto", {}) is DARK
    dark, light = (Screen(Terminal(), "always", theme).token("x", 3.0) for theme in ("dark", "light"))
    assert dark != light


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain é 日 \U0001f600 50 %", "plain é 日 \U0001f600 50 %"),
        ("\x1b]0;PWNED\x07\x1b[2J", r"\x1b]0;PWNED\x07\x1b[2J"),
        ("two\nlines\r\tand \x9b2J", r"two\nlines\r\tand \x9b2J"),
        ("turned \u202e and \u2028 ended", r"turned \u202e and \u2028 ended"),
        ("no character \udcff", r"no character \udcff"),
    ],
)
def test_a_line_is_one_line_without_controls(raw, shown):
    assert printable(raw) == shown
    for out in (Terminal(), io.StringIO()):  # a file may be shown later
        screen = Screen(out, "never")
        screen.line(raw)
        assert out.getvalue() == shown + "\n"


def test_the_legend_fits_on_a_line():
    screen = Screen(out := Terminal(), "always")
    screen.legend()
    plain = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
    cells = ["−2 or less", "−1", "−0.5", "−0.1", "+0.1", "+0.5", "+1", "+2 or more"]
    assert re.split(" {2,}", plain.split(":")[1].strip()) == cells
    assert len(plain) <= 80
    Screen(out := io.StringIO(), "never").legend()
    assert out.getvalue() == ""
