"""Files: what is damaged or foreign is one line with the true reason; what cannot be written changes nothing."""

import errno
import json
import os
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dynlm import files
from dynlm.changes import changing
from dynlm.files import (
    read_json,
    read_tensors,
    replacing,
    require_layout,
    why_unreadable,
    write_json,
    write_tensors,
    write_text,
)
from dynlm.optim.handmade import RMS
from dynlm.optim.library import load_rule, make_rule
from dynlm.optim.sharing import save_rule
from dynlm.types import InputError


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def fails(call, *parts):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: full")]
)
def test_a_full_disk_is_one_line_with_path_and_sizes_and_keeps_the_earlier_file(error, tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()

    def full(*_, **__):
        raise error

    monkeypatch.setattr(files, "save_file", full)
    more = {"a": torch.ones(500_000)}
    fails(lambda: write_tensors(path, more), f"cannot write {path}", "2.0 MB are needed", "are free there")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_full_disk_within_changes_is_one_line(tmp_path):
    def fill():
        with changing(tmp_path / "run") as new:
            new.at(tmp_path / "run" / "model").mkdir()
            raise SafetensorError("No space left on device (os error 28)")

    fails(fill, f"cannot write {tmp_path / 'run'}", "No space left on device")
    assert not list((tmp_path / "run").iterdir())


def test_files_have_the_modes_of_any_new_file(tmp_path, umask):
    write_tensors(tmp_path / "t", {"a": torch.ones(3)})
    write_text(tmp_path / "x", "x")
    with changing(tmp_path / "run") as new:
        save_file({"a": torch.ones(3)}, new.at(tmp_path / "run" / "model"))  # safetensors: for the owner alone
    for path in (tmp_path / "t", tmp_path / "x", tmp_path / "run" / "model"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_content_reaches_the_disk_before_the_rename_and_the_rename_after_it(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (done.append(os.readlink(f"/proc/self/fd/{d}")), fsync(d))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b))[1])
    with replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "x").write_text("x")
    assert [os.path.basename(name) for name in done] == ["folder", "x", "rename", tmp_path.name]


def special(tmp_path, kind):
    path = tmp_path / "it"
    if kind == "folder":
        path.mkdir()
    elif kind == "broken":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "secret":
        path.write_text("{}")
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "it does not exist"),
        ("folder", "it is a folder"),
        ("broken", "it is a broken link"),
        ("loop", "it is a loop of links"),
        ("pipe", "it is no regular file"),
        ("secret", "it cannot be read (Permission denied)"),
    ],
)
def test_what_cannot_be_read_says_why(kind, reason, tmp_path, monkeypatch):
    path = special(tmp_path, kind)
    if kind == "secret":  # also for root, who may read all

        def refuse(name, *_):
            raise PermissionError(errno.EACCES, "Permission denied", name)

        monkeypatch.setattr(os, "open", refuse)
    for read in (read_json, read_tensors):
        fails(lambda read=read: read(path), reason)


def test_names_that_no_file_has():
    assert why_unreadable("a\0b") == "is no name of a file"
    assert "File name too long" in why_unreadable("x" * 5000)


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ("[]", "says of itself a list"),
        ("null", "says of itself a NoneType"),
        ('"text"', "says of itself a str"),
        ("{", "is truncated or not safetensors"),
        ("[" * 100_000, "is truncated or not safetensors"),
        ('{"schema": 2}', "has schema 2, this version of dynlm reads 1"),
        ('{"schema": "1"}', "has schema '1'"),
    ],
)
def test_metadata_is_an_object_of_a_known_schema(meta, said, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "t", metadata={"meta": meta})
    fails(lambda: read_tensors(tmp_path / "t"), str(tmp_path / "t"), said)


def test_deeply_nested_json_is_one_line(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100_000)
    fails(lambda: read_json(tmp_path / "x.json"), "is not readable JSON")


LAYOUT = {"a": torch.ones(2, 3), "n": torch.ones(4, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a": None}, "lacks the tensor 'a'"),
        ({"b": torch.ones(1)}, "holds 'b', which does not belong there"),
        ({"a": torch.ones(3, 2)}, "'a' is floating point (3, 2), expected floating point (2, 3)"),
        ({"a": torch.ones(2, 3, dtype=torch.int64)}, "'a' is whole numbers (2, 3), expected floating point"),
        ({"a": torch.ones(2, 3, dtype=torch.complex64)}, "'a' is complex64 (2, 3), expected floating point"),
        ({"n": torch.ones(4, dtype=torch.bool)}, "'n' is bool (4,), expected whole numbers"),
        ({"n": torch.ones(4)}, "'n' is floating point (4,), expected whole numbers"),
        ({"a": torch.full((2, 3), torch.nan)}, "'a' holds numbers that are not finite"),
        ({"a": torch.full((2, 3), -torch.inf)}, "'a' holds numbers that are not finite"),
        ({"a": torch.full((2, 3), -2.0)}, "'a' holds -2, expected at least 0"),
    ],
)
def test_tensors_that_do_not_fit_are_one_line(change, said):
    tensors = {name: tensor for name, tensor in (LAYOUT | change).items() if tensor is not None}
    fails(lambda: require_layout("file", tensors, LAYOUT, least=0.0), "file", said, "make it again")


def test_tensors_of_any_precision_fit():
    require_layout("file", {"a": torch.ones(2, 3).half(), "n": torch.ones(4, dtype=torch.int64)}, LAYOUT, least=0.0)


@pytest.mark.parametrize(
    ("kind", "meta", "said"),
    [
        ("rms", {"kind": None}, "is no rule: its kind is None"),
        ("rms", {"kind": "rms", "config": []}, "is no rule"),
        ("rms", {"kind": "rms", "made": 3}, "is no rule"),
        ("rms", {"kind": "nope"}, "unknown rule 'nope'"),
        ("gated", {"kind": "gated", "config": {"lr": -1}}, "config: lr is -1: expected a finite number from 0"),
        ("gated", {"kind": "gated", "config": {"hidden": "4"}}, "config: hidden is '4': expected a whole number"),
        ("gated", {"kind": "gated", "config": {"hiden": 4}}, "unknown key 'hiden': did you mean 'hidden'?"),
        (
            "gated",
            {"kind": "gated", "config": {"hidden": 5}},
            "'input_scalars' is floating point (12, 4), expected floating point (15, 4)",
        ),
    ],
)
def test_rules_say_what_they_are(kind, meta, said, tmp_path):
    write_tensors(tmp_path / "rule", make_rule(kind, hidden=4).state_dict() if kind == "gated" else {}, meta)
    fails(lambda: load_rule(tmp_path / "rule"), said)


@pytest.mark.parametrize(("value", "said"), [(-1.0, "rms lr is -1.0"), (float("nan"), "not finite")])
def test_rules_of_nonsense_are_refused(value, said, tmp_path):
    rule = RMS()
    save_rule(rule, tmp_path / "rms")
    tensors, meta = read_tensors(tmp_path / "rms")
    write_tensors(tmp_path / "rms", {**tensors, "lr": torch.full_like(tensors["lr"], value)}, meta)
    fails(lambda: load_rule(tmp_path / "rms"), str(tmp_path / "rms"), said)
    save_rule(rule, tmp_path / "rms")
    assert load_rule(tmp_path / "rms")[0].settings() == rule.settings()


def test_a_rule_is_of_the_kind_that_its_name_says(tmp_path):
    for name in ("gated", "gated#1", "mine"):
        save_rule(RMS(), tmp_path / name)
    for name in ("gated", "gated#1"):
        fails(lambda name=name: load_rule(tmp_path / name), "holds a rule of kind 'rms', not 'gated'")
    assert load_rule(tmp_path / "mine")[0].name == "rms"


def test_write_text_is_bytes_as_they_are(tmp_path):
    write_text(tmp_path / "x", json.dumps("ü\r\n") + "\n")
    assert (tmp_path / "x").read_bytes() == b'"\\u00fc\\r\\n"\n'


def test_devices_that_never_end_are_told_from_those_that_do():
    assert why_unreadable("/dev/zero") == "is a device that never ends"
    assert why_unreadable("/dev/null") is None


def test_tensors_and_their_meta_come_back(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3).t(), "b": torch.tensor(2.5, dtype=torch.float64)}
    write_tensors(tmp_path / "x" / "t.safetensors", tensors, {"step": 3})
    again, meta = read_tensors(tmp_path / "x" / "t.safetensors")
    assert meta == {"step": 3}
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    shared = torch.ones(4)
    write_tensors(tmp_path / "t", {"a": shared, "b": shared[:2]})
    again, _ = read_tensors(tmp_path / "t")
    assert again["b"].tolist() == [1, 1]


def test_an_error_while_writing_keeps_the_earlier_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "first")

    def broken():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_directories_are_replaced_whole(tmp_path):
    for name in ("old", "new"):
        with replacing(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_strict_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"nats": float("inf")})
    assert not (tmp_path / "x.json").exists()
    write_json(tmp_path / "x.json", {"a": [1, 2]})
    assert read_json(tmp_path / "x.json") == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), (b"{", "not readable JSON"), (b"[1]", "holds a list")]
)
def test_bad_json_is_one_clear_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "x.json")


def test_unwritable_places_are_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*; choose another run directory"):
        write_text(tmp_path / "file" / "below" / "x", "text")
