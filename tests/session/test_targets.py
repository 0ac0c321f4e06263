"""What `dynlm read` writes to: tried before reading, never foreign, never an input; links and modes stay."""

import os

import pytest
import torch

from dynlm.cli import read as command
from dynlm.cli.main import main
from dynlm.files import read_tensors, write_tensors
from dynlm.session.targets import Target, is_memory, is_page, require_apart
from dynlm.types import InputError
from support.commands import fails

TEXT = "The cat sat on the mat .\nThe cat sat on the mat again .\n" * 4


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def unread(monkeypatch):
    """Nothing may be loaded or read before a bad target is told."""
    monkeypatch.setattr(command, "_reader", lambda settings: pytest.fail("a model was loaded"))


def read(text, *flags):
    return main(["read", str(text), "--rule", "rms", "--quiet", *map(str, flags)])


@pytest.mark.parametrize("flag", ["--html", "--save-memory"])
def test_an_input_is_never_written_to(text, tmp_path, capsys, unread, flag):
    (tmp_path / "hard.txt").hardlink_to(text)
    (tmp_path / "soft.txt").symlink_to(text)
    for name in ("a.txt", "hard.txt", "soft.txt"):
        fails(capsys, ["read", text, flag, tmp_path / name, "--overwrite"], "it is read")
    prior = ["read", text, "--model", "m", "--prior-text", tmp_path / "hard.txt"]
    fails(capsys, [*prior, flag, tmp_path / "soft.txt", "--overwrite"], "it is read")
    assert text.read_text() == TEXT


@pytest.mark.parametrize("flag", ["--html", "--save-memory"])
def test_what_is_no_regular_file_is_refused(text, tmp_path, capsys, unread, flag):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "device").symlink_to("/dev/null")
    kinds = {tmp_path: "a folder", tmp_path / "pipe": "a pipe", tmp_path / "loop": "loop of links"}
    for name, kind in {**kinds, "/dev/null": "no regular file", tmp_path / "device": "no regular file"}.items():
        fails(capsys, ["read", text, flag, name, "--overwrite"], "cannot write", kind)
    fails(capsys, ["read", text, flag, tmp_path / "no" / "file"], "existing folder")
    fails(capsys, ["read", text, flag, text / "file"], "existing folder")
    assert not os.path.isfile("/dev/null")


@pytest.mark.parametrize("flag", ["--html", "--save-memory"])
def test_foreign_files_are_replaced_only_when_asked(text, tmp_path, capsys, flag):
    target, empty = tmp_path / "mine", tmp_path / "empty"
    empty.touch()
    tensor, named = tmp_path / "tensors", tmp_path / "notes.txt"
    write_tensors(tensor, {"x": torch.ones(3)}, {"kind": "my own"})
    named.write_text('<meta name="generator" content="dynlm read"> and dynlm memory 1 are what I wrote about')
    target.write_text("<!DOCTYPE html>\n<title>my page</title>")
    before = {path: path.read_bytes() for path in (target, tensor, named)}
    for path in before:
        fails(capsys, ["read", text, flag, path], "was not written by dynlm", "--overwrite")
    assert before == {path: path.read_bytes() for path in before}
    for path in (target, empty):
        assert read(text, flag, path, *(["--overwrite"] if path is target else [])) == 0
        assert (is_page if flag == "--html" else is_memory)(path)
        assert read(text, flag, path) == 0  # its own


def test_a_page_is_no_memory_and_two_targets_are_two_files(text, tmp_path, capsys):
    page, memory = tmp_path / "p", tmp_path / "m"
    assert read(text, "--html", page, "--save-memory", memory) == 0
    fails(capsys, ["read", text, "--html", memory], "was not written by dynlm")
    fails(capsys, ["read", text, "--save-memory", page], "was not written by dynlm")
    fails(capsys, ["read", text, "--load-memory", memory, "--html", memory, "--overwrite"], "it is read")
    assert read(text, "--load-memory", memory, "--save-memory", memory, "--rule", "rms") == 0  # reading on in place
    (tmp_path / "link").symlink_to(page)
    fails(capsys, ["read", text, "--html", page, "--save-memory", tmp_path / "link", "--overwrite"], "are one file")
    require_apart([Target(str(tmp_path / name), [], is_page, False) for name in ("x", "y")])


@pytest.mark.parametrize("flag", ["--html", "--save-memory"])
def test_a_link_is_written_through_and_a_mode_is_kept(text, tmp_path, flag):
    (tmp_path / "far").mkdir()
    target, link, dangling = tmp_path / "far" / "file", tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "far" / "new")
    target.touch(0o640)
    target.chmod(0o640)
    assert read(text, flag, link) == read(text, flag, dangling) == 0
    assert all(path.is_symlink() for path in (link, dangling))
    assert all(path.stat().st_size > 1000 for path in (target, tmp_path / "far" / "new"))
    assert target.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.rglob("*") if p.name.startswith(".")] == []


def test_a_folder_without_permission_is_told_before_reading(text, tmp_path, capsys, unread, monkeypatch):
    def refuse(prefix, dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("dynlm.session.targets.tempfile.mkdtemp", refuse)
    fails(capsys, ["read", text, "--html", tmp_path / "p"], "cannot write", "Permission denied", "another folder")


def test_a_read_only_file_stays(text, tmp_path, monkeypatch):
    path = tmp_path / "p"
    path.write_text("kept")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(InputError, match="read-only"):
        Target(str(path), [], is_page, True)


def test_what_fails_within_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "p"
    path.write_text("kept")
    target = Target(str(path), [], is_page, True)
    with pytest.raises(UnicodeEncodeError), target.writing() as temporary:
        temporary.write_text("half \udcff", encoding="utf-8")
    assert path.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]


def test_a_memory_is_read_as_such_whatever_its_name(text, tmp_path):
    memory = tmp_path / "with\nnewline"
    assert read(text, "--save-memory", memory) == 0
    assert read_tensors(memory)[1]["kind"] == "dynlm memory 1"
