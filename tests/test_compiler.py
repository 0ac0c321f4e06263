"""Compilers that lack something, fail, lie or hang: other flags, or torch does the work, with one note."""

import functools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dynlm
from dynlm import compile_cache, compiler, kernels
from dynlm.compiler import supported, why_not
from dynlm.optim.base import Prior
from dynlm.optim.handmade import SGD
from dynlm.optim.kernel import InPlaceUpdate
from dynlm.types import InputError
from lab import needs_compiler
from support.optimizers import moved

REAL = shutil.which("gcc") or shutil.which("clang")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """As in a new process, with an empty cache folder."""
    caches = [compiler._tools, compiler._probe, compiler._build, kernels._try_to_build, compile_cache.note]

    def forget():
        for cache in caches:
            cache.cache_clear()
        kernels._built.clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "PROBE_LIMIT", 20.0)
    forget()
    yield
    forget()


@pytest.fixture
def compile_with(tmp_path, monkeypatch):
    """Makes a shell script the compiler."""

    def use(script, name="cc-of-this-test"):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CC", str(path))
        return path

    return use


def notes_of(caplog):
    return [record.getMessage() for record in caplog.records]


def step_with(name, compiled=None):
    """Weights after three steps of a rule."""
    rule, shapes = moved(name), [(5, 4), (1, 6)]
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    priors = [Prior("", draw(*s), draw(*s).abs() + 0.1, 0.8, 1.0) for s in shapes]
    state, thetas = rule.init(priors), [p.theta0.clone() for p in priors]
    step = InPlaceUpdate(rule, compiled)
    for _ in range(3):
        state.clock.tick(3.0)
        step(thetas, [draw(*s) for s in shapes], state, priors)
    return thetas


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


BROKEN = {
    "fails": "echo 'x.c:1: error: it does not work' >&2; exit 1",
    "fails without a word": "exit 3",
    "no text": r"printf 'error \377\376\033[31m\a' >&2; exit 1",
    "wrote nothing": "exit 0",
    "garbage": 'for last; do :; done; while [ "$1" != -o ]; do shift; done; echo garbage > "$2"',
    "empty": 'while [ "$1" != -o ]; do shift; done; : > "$2"',
    "killed": "kill -9 $$",
    "cut short": f'{REAL} "$@" || exit; case "$*" in *-shared*) truncate -s -4096 kernel.so; esac',
    "another function": (
        f'case "$*" in *-shared*) {REAL} "$@";; *) echo "int other(void) {{ return 1; }}" > other.c; '
        f"{REAL} -fPIC -c other.c -o kernel.o; esac"
    ),
    "counts wrong": (
        f'case "$*" in *-shared*) {REAL} "$@";; *) echo "int probe(int n) {{ return n; }}" > other.c; '
        f"{REAL} -fPIC -c other.c -o kernel.o; esac"
    ),
}


@needs_compiler
@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN)
def test_a_compiler_that_does_not_work_is_noted_once_and_torch_takes_over(script, compile_with, caplog, monkeypatch):
    path = compile_with(script)
    found = [step_with(name) for name in ("gated", "general", "adam", "lstm")]
    (told,) = notes_of(caplog)
    assert str(path) in told
    assert told.isprintable()
    monkeypatch.setenv("DYNLM_KERNEL", "eager")
    for ours, name in zip(found, ("gated", "general", "adam", "lstm"), strict=True):
        assert_close(ours, step_with(name))


@needs_compiler
@pytest.mark.parametrize("script", [BROKEN["fails"], BROKEN["garbage"], BROKEN["wrote nothing"]])
def test_compiled_insists(script, compile_with, monkeypatch, caplog):
    path = compile_with(script)
    with pytest.raises(InputError, match=f"^kernel is 'compiled', but {path} "):
        InPlaceUpdate(SGD(), compiled=True)
    monkeypatch.setenv("DYNLM_KERNEL", "compiled")
    with pytest.raises(InputError, match=f"^DYNLM_KERNEL is 'compiled', but {path} ") as error:
        step_with("sgd")
    assert "\n" not in str(error.value)
    assert notes_of(caplog) == []


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(compile_with, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "PROBE_LIMIT", 0.5)
    compile_with(f"sleep 600 & echo $! > {tmp_path}/child; wait")
    start = time.monotonic()
    step_with("adam")
    assert time.monotonic() - start < 20
    (told,) = notes_of(caplog)
    assert "was not done after 0.5 seconds" in told
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the compiler's child lives on")


@needs_compiler
def test_a_compiler_that_works_but_for_one_kernel_leaves_that_one_to_torch(compile_with, caplog, monkeypatch):
    """As when the disk fills up, or a source is too much for it."""
    compile_with(f"grep -q 'void means' kernel.c && exit 1; exec {REAL} \"$@\"")
    assert supported(torch.zeros(1))
    found = step_with("general")
    assert len(notes_of(caplog)) == 1
    monkeypatch.setenv("DYNLM_KERNEL", "eager")
    assert_close(found, step_with("general"))


LACKING = {
    "native": ("-march=native", "unsupported option '-march=native'"),
    "vectors": ("-mprefer-vector-width=512", "unknown argument"),
    "openmp": ("-fopenmp", "unsupported option '-fopenmp'"),
}


@needs_compiler
@pytest.mark.parametrize("lacking", LACKING)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_compiler_that_lacks_something_is_asked_for_less(lacking, threads, compile_with, caplog, monkeypatch):
    """Apple's clang has no OpenMP, and some compilers no 'native'."""
    flag, message = LACKING[lacking]
    compile_with(f'case "$*" in *{flag}*) echo "error: {message}" >&2; exit 1; esac; exec {REAL} "$@"')
    torch.set_num_threads(threads)
    assert why_not() is None
    names = ("gated", "general", "adam", "lstm")
    found = [step_with(name, compiled=True) for name in names]
    assert notes_of(caplog) == []
    monkeypatch.setenv("DYNLM_KERNEL", "eager")
    for ours, name in zip(found, names, strict=True):
        assert_close(ours, step_with(name))


@needs_compiler
def test_a_compiler_that_lacks_openmp_and_native_still_compiles(compile_with):
    compile_with(f'case "$*" in *-fopenmp*|*-march*) exit 1; esac; exec {REAL} "$@"')
    assert why_not() is None
    assert not {"-fopenmp", "-march=native"} & set(compiler._probe(os.environ["CC"]).compile)


@needs_compiler
def test_the_second_process_does_not_call_the_compiler(compile_with, tmp_path):
    compile_with(f'echo x >> {tmp_path}/calls; exec {REAL} "$@"')
    code = "import torch; from dynlm.compiler import supported; assert supported(torch.zeros(1))"
    environment = {**os.environ, "PYTHONPATH": str(Path(dynlm.__file__).parents[1])}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert len((tmp_path / "calls").read_text().split()) == 2  # compiled and linked once


def test_no_compiler_at_all_is_one_note(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    step_with("adam")
    step_with("gated")
    (told,) = notes_of(caplog)
    assert "no C compiler was found" in told
    monkeypatch.setenv("DYNLM_KERNEL", "compiled")
    with pytest.raises(InputError, match="'compiled', but no C compiler was found: install gcc"):
        step_with("adam")


def test_no_place_to_compile_is_one_note(monkeypatch, caplog):
    def nowhere(*args, **kwargs):
        raise OSError(28, "No space left on device", "/tmp/x")

    monkeypatch.setattr("tempfile.mkdtemp", nowhere)
    step_with("adam")
    (told,) = notes_of(caplog)
    assert "No space left" in told


@pytest.mark.parametrize("chosen", ["eager", "torch"])
def test_who_asks_for_torch_is_not_told_of_it(chosen, monkeypatch, caplog, compile_with):
    compile_with("exit 1")
    monkeypatch.setenv("DYNLM_KERNEL", chosen)
    assert not supported(torch.zeros(1))
    assert notes_of(caplog) == []


@pytest.mark.parametrize("value", ["nonsense", "Eager", "1", " auto"])
def test_an_unknown_kernel_is_one_clear_line(value, monkeypatch):
    monkeypatch.setenv("DYNLM_KERNEL", value)
    with pytest.raises(InputError, match=r"^DYNLM_KERNEL is '.*': set it to one of auto, compiled, eager") as error:
        InPlaceUpdate(SGD())
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="DYNLM_KERNEL is"):
        supported(torch.zeros(1))


@pytest.mark.parametrize("value", ["", "auto"])
def test_an_empty_variable_is_auto(value, monkeypatch):
    monkeypatch.setenv("DYNLM_KERNEL", value)
    assert supported(torch.zeros(1)) == (compiler.find_compiler() is not None)
