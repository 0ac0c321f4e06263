"""The one door to disk: whole files or none."""

import json

import pytest
import torch

from dynlm.runs import Run, read_json, read_tensors, replacing, write_json, write_log, write_tensors, write_text
from dynlm.types import InputError


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


def test_a_run_touches_nothing_and_logs_line_by_line(tmp_path):
    run = Run(tmp_path / "run")
    assert not run.path.exists()
    write_log(run.log("train"), [{"step": 0}, {"step": 1}])
    assert [json.loads(line)["step"] for line in run.log("train").read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_a_run_has_a_name_that_a_file_system_takes(name):
    with pytest.raises(InputError, match=r"--run is .*: give the name of a directory"):
        Run(name)
