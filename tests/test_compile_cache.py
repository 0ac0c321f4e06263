"""What is loaded from the cache folder is ours and whole; everything else is built again, and nothing crashes."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynlm import compile_cache
from dynlm.compile_cache import library
from lab import needs_compiler

pytestmark = needs_compiler

IDENTITY = "a kernel of these tests"
NAME = f"kernel-{hashlib.sha256(IDENTITY.encode()).hexdigest()[:32]}"
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def compiled(folder, source):
    (folder / "s.c").write_text(source)
    compiler = shutil.which("gcc") or shutil.which("clang")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "s.so", folder / "s.c"], check=True)
    return (folder / "s.so").read_bytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("good"), "int answer(void) { return 42; }")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "foreign code ran"


@pytest.fixture
def evil(tmp_path, marker):
    """A library that leaves a file behind when it is loaded."""
    folder = tmp_path / "evil"
    folder.mkdir()
    run = f'__attribute__((constructor)) static void run(void) {{ fclose(fopen("{marker}", "w")); }}'
    return compiled(folder, f"#include <stdio.h>\n{run}\nint answer(void) {{ return 13; }}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dynlm"


@pytest.fixture
def notes(caplog):
    compile_cache.note.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records]
    compile_cache.note.cache_clear()


class Maker:
    """Gives the library, and counts."""

    def __init__(self, content):
        self.content, self.calls = content, 0

    def __call__(self):
        self.calls += 1
        return self.content


def name_of(content):
    return f"{NAME}-{hashlib.sha256(content).hexdigest()}.so"


def put(folder, content, name=None, mode=0o600):
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / (name or name_of(content))
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_library_is_kept_for_this_user_alone_whatever_the_umask(umask, cache, good):
    make, before = Maker(good), os.umask(umask)
    try:
        assert [library(IDENTITY, make).answer() for _ in range(3)] == [42] * 3
    finally:
        os.umask(before)
    assert make.calls == 1
    assert [p.name for p in cache.iterdir()] == [name_of(good)]
    assert stat.S_IMODE((cache / name_of(good)).stat().st_mode) == 0o600
    for folder in (cache, cache.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_planted_library_of_these_tests_would_run(cache, evil, good, marker):
    """As our own file in our own folder it is loaded: the trust ends at the user's account."""
    put(cache, evil)
    assert library(IDENTITY, Maker(good)).answer() == 13
    assert marker.exists()


def writable_file(mode):
    return lambda cache, evil: put(cache, evil, mode=mode)


def writable_folder(mode):
    def plant(cache, evil):
        put(cache, evil)
        cache.chmod(mode)

    return plant


def linked_file(cache, evil):
    put(cache, evil).rename(cache.parent / "elsewhere.so")
    (cache / name_of(evil)).symlink_to(cache.parent / "elsewhere.so")


def linked_folder(cache, evil):
    put(cache, evil)
    cache.rename(cache.parent / "elsewhere")
    cache.symlink_to("elsewhere")


def another_content(cache, evil):
    put(cache, evil, name_of(b"what was built"))


def old_name(cache, evil):
    put(cache, evil, f"{NAME}.so")


def name_without_sum(cache, evil):
    put(cache, evil, f"{NAME}-.so")


def longer(cache, evil):
    put(cache, evil + b"more", name_of(evil))


def foreign_file(cache, evil):
    os.chown(put(cache, evil), NOBODY, NOBODY)


def foreign_folder(cache, evil):
    put(cache, evil)
    os.chown(cache, NOBODY, NOBODY)


def hard_link_to_a_foreign_file(cache, evil):
    other = put(cache.parent / "theirs", evil)
    os.chown(other, NOBODY, NOBODY)
    cache.mkdir(mode=0o700)
    os.link(other, cache / name_of(evil))


ATTACKS = {
    "file for everyone": writable_file(0o777),
    "file for the group": writable_file(0o660),
    "folder for everyone": writable_folder(0o777),
    "folder for the group": writable_folder(0o770),
    "sticky folder for everyone": writable_folder(0o1777),
    "link": linked_file,
    "linked folder": linked_folder,
    "another content": another_content,
    "old name": old_name,
    "no checksum": name_without_sum,
    "longer": longer,
    "foreign file": pytest.param(foreign_file, marks=as_root),
    "foreign folder": pytest.param(foreign_folder, marks=as_root),
    "hard link": pytest.param(hard_link_to_a_foreign_file, marks=as_root),
}


@pytest.mark.parametrize("plant", ATTACKS.values(), ids=ATTACKS)
def test_foreign_code_never_runs(plant, cache, evil, good, marker):
    plant(cache, evil)
    assert [library(IDENTITY, Maker(good)).answer() for _ in range(2)] == [42, 42]
    assert not marker.exists()


@pytest.fixture
def working_folder(tmp_path, monkeypatch, evil):
    """A folder that one happens to work in, and that brings code along."""
    put(tmp_path / "here" / "dynlm", evil)
    put(tmp_path / "here" / ".cache" / "dynlm", evil)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_a_relative_path_is_ignored(variable, good, marker, working_folder, monkeypatch, notes):
    monkeypatch.setenv(variable, "here")
    assert library(IDENTITY, Maker(good)).answer() == 42
    assert not marker.exists()
    assert (working_folder / "home" / ".cache" / "dynlm").exists() == (variable == "XDG_CACHE_HOME")
    assert len(notes()) == (variable == "HOME")


def test_a_folder_that_is_exchanged_after_the_check_changes_nothing(cache, evil, good, marker):
    def swap():
        cache.rename(cache.parent / "checked")
        put(cache, evil)
        put(cache, evil, name_of(good))
        return good

    assert library(IDENTITY, swap).answer() == 42
    assert not marker.exists()
    assert (cache.parent / "checked" / name_of(good)).read_bytes() == good


DAMAGES = {
    "half": lambda content: content[: len(content) // 2],
    "last page": lambda content: content[:-4096],
    "last byte": lambda content: content[:-1],
    "empty": lambda content: b"",
    "text": lambda content: b"not a library",
    "head": lambda content: content[:16],
    "flipped": lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_library_is_built_again(damage, cache, good):
    put(cache, damage(good), name_of(good))
    make = Maker(good)
    assert [library(IDENTITY, make).answer() for _ in range(2)] == [42, 42]
    assert make.calls == 1
    assert (cache / name_of(good)).read_bytes() == good


@pytest.mark.parametrize("damage", [d for n, d in DAMAGES.items() if n != "flipped"])
def test_what_a_compiler_did_not_finish_is_an_error_and_not_kept(damage, cache, good, notes):
    with pytest.raises(OSError, match=r"no whole library|file too short"):
        library(IDENTITY, Maker(damage(good)))
    assert list(cache.iterdir()) == []
    assert notes() == []


@pytest.mark.parametrize("kind", ["pipe", "folder", "full folder"])
def test_what_is_no_file_in_its_place_neither_blocks_nor_ends_the_command(kind, cache, good, notes):
    cache.mkdir(parents=True, mode=0o700)
    place = cache / name_of(good)
    os.mkfifo(place) if kind == "pipe" else place.mkdir()
    if kind == "full folder":
        (place / "file").touch()
    assert library(IDENTITY, Maker(good)).answer() == 42
    assert len(notes()) == (kind != "pipe")


def home_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


def cache_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "dynlm").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def nobody_at_home(tmp_path, monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


def unwritable(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")


def full(tmp_path, monkeypatch):
    """No space in the cache folder, but in the temporary one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failing, sync = [OSError(28, "No space left on device")], os.fsync

    def fsync(descriptor):
        if failing:
            raise failing.pop()
        sync(descriptor)

    monkeypatch.setattr("os.fsync", fsync)


@pytest.mark.parametrize("place", [home_is_a_file, cache_is_a_file, nobody_at_home, unwritable, full])
def test_without_a_folder_a_library_is_built_for_this_process_with_one_note(place, tmp_path, monkeypatch, good, notes):
    place(tmp_path, monkeypatch)
    make, temporary = Maker(good), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert library(IDENTITY, make).answer() == 42
    if place is not full:
        assert library(IDENTITY, make).answer() == 42
    assert len(notes()) == 1
    assert "each command builds" in notes()[0]
    assert list(temporary.iterdir()) == []


def test_a_folder_that_others_may_write_to_is_noted_once(cache, good, notes):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    for _ in range(2):
        library(IDENTITY, Maker(good))
    (told,) = notes()
    assert "chmod 700" in told
    assert list(cache.iterdir()) == []


RACE = """
import sys
from pathlib import Path
from dynlm.compile_cache import library
go = Path(sys.argv[2])
while not go.exists():
    pass
print(library(sys.argv[1], Path(sys.argv[3]).read_bytes).answer())
"""


def test_three_processes_at_once_are_right(cache, good, tmp_path):
    (tmp_path / "library").write_bytes(good)
    command = [sys.executable, "-c", RACE, IDENTITY, str(tmp_path / "go"), str(tmp_path / "library")]
    environment = {**os.environ, "PYTHONPATH": str(Path(compile_cache.__file__).parents[1])}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    time.sleep(1.0)
    (tmp_path / "go").touch()
    assert [process.communicate(timeout=60)[0] for process in started] == ["42\n"] * 3
    assert [p.name for p in cache.iterdir()] == [name_of(good)]
