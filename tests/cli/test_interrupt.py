"""Signals while `dynlm read` reads: what was read so far is summed up, kept and shown; Ctrl-C 130, SIGTERM 143."""

import io
import os
import re
import signal
import subprocess
import sys

import pytest

from dynlm.cli.main import main
from dynlm.cli.read import Outcome
from dynlm.cli.stop import Stop, Stopped
from dynlm.files import read_tensors

LINE = "The cat sat on the mat , and the cat liked the mat .\n"


class Pipe(io.RawIOBase):
    """Lines, then what waits for more is interrupted."""

    def __init__(self, lines):
        self.lines = lines

    def read1(self, size=-1):
        self.lines -= 1
        if self.lines < 0:
            raise KeyboardInterrupt
        return LINE.encode()


@pytest.fixture(autouse=True)
def listening():
    """A shell in the background has its children set SIGINT aside."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_stream_that_is_interrupted_keeps_what_was_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", type("In", (), {"buffer": Pipe(20)}))
    page, memory = tmp_path / "page.html", tmp_path / "memory"
    with pytest.raises(SystemExit) as end:
        main(["read", "-", "--rule", "rms", "--html", str(page), "--save-memory", str(memory)])
    assert end.value.code == 130
    out, err = capsys.readouterr()
    read = re.split(r"\n[\d,]+ words", out)[0]
    tokens = int(re.search(r"interrupted after (\d+) tokens", err)[1])
    assert tokens > 0
    assert tokens % 32 == 0
    assert f"{tokens} tokens, " in out
    assert (LINE * 20).startswith(read)
    told = int(re.search(r"(\d+) words", out)[1])
    assert abs(told - len(read.split())) <= 1  # of what was read, not of what came
    shown = re.findall(r'<span[^>]* data-s="[\d.]+" data-a="[\d.]+">([^<]*)</span>', page.read_text())
    assert "".join(shown) == read
    assert read_tensors(memory)[1]["kind"].startswith("dynlm memory")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_is_written_where_nothing_was_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", type("In", (), {"buffer": Pipe(0)}))
    with pytest.raises(SystemExit) as end:
        main(["read", "-", "--rule", "rms", "--html", str(tmp_path / "p"), "--save-memory", str(tmp_path / "m")])
    assert end.value.code == 130
    assert not list(tmp_path.iterdir())
    assert "interrupted after 0 tokens" in capsys.readouterr().err


def test_a_signal_ends_the_process_with_its_code(tmp_path):
    page, memory = tmp_path / "page.html", tmp_path / "memory"
    command = [sys.executable, "-m", "dynlm.cli.main", "read", "-", "--rule", "rms", "--html", str(page)]
    command += ["--save-memory", str(memory)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, env={**os.environ, "OMP_NUM_THREADS": "1"}) as p:
        p.stdin.write(LINE.encode() * 40)
        p.stdin.flush()
        first = p.stdout.read(1)  # it reads now
        p.send_signal(signal.SIGTERM)
        out, err = p.stdout.read(), p.stderr.read()
        assert p.wait() == 143
    assert first == b"T"
    assert b"word perplexity" in out
    assert b"interrupted after" in err
    assert b"Traceback" not in err
    assert page.is_file()
    assert read_tensors(memory)[1]["kind"].startswith("dynlm memory")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_each_signal_ends_with_its_code_and_keeps_what_was_read(tmp_path, monkeypatch, capsys, number, code):
    class Signalled(Pipe):
        def read1(self, size=-1):
            if self.lines == 1:
                signal.raise_signal(number)
            return super().read1(size)

    monkeypatch.setattr("sys.stdin", type("In", (), {"buffer": Signalled(40)}))
    page, memory = tmp_path / "page.html", tmp_path / "memory"
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which a parent, as nohup, may have set aside
    try:
        with pytest.raises(SystemExit) as end:
            main(["read", "-", "--rule", "rms", "--html", str(page), "--save-memory", str(memory)])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert end.value.code == code
    out, err = capsys.readouterr()
    assert out.startswith("T")
    assert "word perplexity" in out
    assert "interrupted after" in err
    assert page.is_file()
    assert read_tensors(memory)[1]["kind"].startswith("dynlm memory")


def test_a_hang_up_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked
            signal.raise_signal(signal.SIGTERM)
            assert stop.exit_code == 143
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_the_page_is_written_lets_it_be_whole(tmp_path, monkeypatch):
    text, page = tmp_path / "a.txt", tmp_path / "page.html"
    text.write_text(LINE * 9)
    write = Outcome.write_page
    monkeypatch.setattr(Outcome, "write_page", lambda *a: (signal.raise_signal(signal.SIGTERM), write(*a)))
    with pytest.raises(SystemExit) as end:
        main(["read", str(text), "--rule", "rms", "--html", str(page)])
    assert end.value.code == 143
    assert page.read_text().endswith("</html>\n") or page.read_text().endswith("</html>")


def test_a_signal_waits_for_the_segment_and_a_second_one_does_not():
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(Stopped):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
