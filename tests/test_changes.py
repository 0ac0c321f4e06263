"""Files that change as one: when the process is killed, all of them change, or none."""

import json
import os

import pytest

from dynlm.changes import COMMIT, LIST, changing, complete
from dynlm.types import InputError


class KilledError(BaseException):
    """The process ends here: nothing after it runs."""


def contents(folder):
    found = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}
    return {name: text for name, text in found.items() if not name.startswith(".")}


def make_run(folder):
    for name in ("model/weights", "model/config", "recipe.json", "rules/rms"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    return contents(folder)


def change(folder):
    with changing(folder) as new:
        model = new.at(folder / "model")
        model.mkdir()
        (model / "weights").write_text("new")
        new.at(folder / "recipe.json").write_text("new")
        new.at(folder / "deep" / "er" / "log").write_text("new")
        new.remove(folder / "rules" / "rms", folder / "rules" / "none", folder / "recipe.json")


AFTER = {"model/weights": "new", "recipe.json": "new", "deep/er/log": "new"}


def test_files_and_folders_change_together_and_nothing_else_is_left(tmp_path):
    make_run(tmp_path)
    change(tmp_path)
    assert contents(tmp_path) == AFTER
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "model", "recipe.json"]


def test_an_error_inside_changes_nothing(tmp_path):
    before = make_run(tmp_path)

    def broken():
        with changing(tmp_path) as new:
            new.at(tmp_path / "recipe.json").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert contents(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "recipe.json", "rules"]


def mortal(function, life):
    """``function``, as long as there is life: then it and all that would run later, as clean-up, raises."""

    def wrapper(*arguments, **more):
        if next(life, None) is None:
            raise KilledError
        return function(*arguments, **more)

    return wrapper


def test_whenever_it_is_killed_all_or_nothing_has_changed(tmp_path, monkeypatch):
    """Killed before each rename, removal and new folder in turn."""
    outcomes = set()
    for point in range(40):
        run = tmp_path / str(point)
        before, life = make_run(run), iter(range(point))
        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
                patch.setattr(os, name, mortal(getattr(os, name), life))
            killed = False
            try:
                change(run)
            except KilledError:
                killed = True
        complete(run)
        assert contents(run) in (before, AFTER), point
        outcomes.add((killed, contents(run) == AFTER))
        if not killed:
            break
    assert outcomes == {(True, False), (True, True), (False, True)}


@pytest.mark.parametrize("name", ["../outside", "link/file", "/etc/passwd"])
def test_a_strangers_list_reaches_nothing_outside(tmp_path, name):
    run, outside = tmp_path / "run", tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    (run / COMMIT).mkdir(parents=True)
    (run / "link").symlink_to(tmp_path / "folder")
    (run / COMMIT / LIST).write_text(json.dumps({"remove": [name], "place": []}))
    with pytest.raises(InputError, match="which is outside of"):
        complete(run)
    assert (outside.read_text(), (tmp_path / "folder" / "file").read_text()) == ("mine", "mine")
