"""What is no plain file: read where it can be read, else refused with the true reason."""

import os
import subprocess
import sys
import threading

import pytest

from dynlm.cli.main import main
from dynlm.data.articles import DataConfig, load_corpus
from dynlm.data.texts import read_texts
from dynlm.types import InputError

TEXT = "A text that comes through a pipe.\nIt has two lines.\n"


def test_a_pipe_is_read(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=lambda: path.write_text(TEXT), daemon=True).start()
    (text,) = read_texts([str(path)])
    assert text.article().text == TEXT


@pytest.mark.parametrize("how", ['"$@" <(cat x.txt)', 'cat x.txt | "$@" /dev/stdin', '"$@" /dev/stdin < x.txt'])
def test_shells_give_texts_without_files(how, tmp_path):
    (tmp_path / "x.txt").write_text(TEXT)
    command = [sys.executable, "-m", "dynlm", "read", "--rule", "static"]
    done = subprocess.run(
        ["bash", "-c", how, "bash", *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(TEXT)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.symlink_to(path), "is a loop of links"),
        (lambda path: path.symlink_to("nothing"), "is a broken link"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device that never ends"),
        (lambda path: None, "does not exist"),
    ],
)
def test_the_reason_is_the_true_one(make, reason, tmp_path):
    path = tmp_path / "x.txt"
    make(path)
    with pytest.raises(InputError, match=rf"^{path} {reason}$"):
        read_texts([str(path)])
    with pytest.raises(InputError, match=rf"{path}.* {reason}$"):
        load_corpus(DataConfig(source=str(path)))


def test_recipes_too(tmp_path, capsys):
    (tmp_path / "x.toml").symlink_to("nothing")
    for path, reason in ((tmp_path / "x.toml", "is a broken link"), (tmp_path / "y.toml", "does not exist")):
        assert main(["train", str(path)]) == 2
        assert capsys.readouterr().err == f"dynlm: recipe {path} {reason}\n"


def test_a_corpus_is_no_pipe_for_later_stages_read_it_again(tmp_path):
    os.mkfifo(tmp_path / "x.txt")
    with pytest.raises(InputError, match="can be read only once: write it to a file"):
        load_corpus(DataConfig(source=str(tmp_path / "x.txt")))


def test_nothing_is_empty():
    with pytest.raises(InputError, match="is empty"):
        next(read_texts(["/dev/null"])).article()
