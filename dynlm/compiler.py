"""Building C source into libraries with the compiler of this machine, once a machine: the cache folder keeps them.

A small probe is built first, with fewer and fewer of the flags that a compiler may lack, and run. Where nothing works,
everything is done by torch, with the same results. dynlm.kernels is the door into what is built here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dynlm.compile_cache import library, note
from dynlm.types import InputError

CHOICES = ("auto", "compiled", "eager", "torch")
"""of ``DYNLM_KERNEL``: auto compiles where that works, compiled insists on it, torch has ``torch.compile`` do it"""
TIME_LIMIT, PROBE_LIMIT = 120.0, 60.0
"""seconds for one call of the compiler, which takes a few for the largest kernel"""
# reassociation and reciprocals, but NaN and infinity keep their meaning; the link step must not see -ffast-math, which
# would switch off denormals for the whole process
FLAGS = ("-O3", "-fPIC", "-ffast-math", "-fno-finite-math-only")
NATIVE = ("-march=native", *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []))
TYPES = {
    torch.float32: "typedef float T;\n#define ABS fabsf\n#define SQRT sqrtf\n#define LOG2 log2f\n",
    torch.float64: "typedef double T;\n#define ABS fabs\n#define SQRT sqrt\n#define LOG2 log2\n",
}
HEAD = """#include <math.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num(void) { return 0; }
#endif
"""
PROBE = """
int probe(int n) {
  double sum = 0;
  #pragma omp parallel for num_threads(2) reduction(+: sum)
  for (int i = 1; i <= n; i++) sum += SQRT((T)i * i);
  return (int)(sum + 0.5);
}
"""


class CompileError(Exception):
    """Why a source could not be built, in one line."""


class TimeLimitError(CompileError):
    """The compiler was not done in time."""


class Toolchain(NamedTuple):
    """A compiler and flags that work."""

    compiler: str
    compile: tuple[str, ...]
    link: tuple[str, ...]


def kernel_choice() -> str:
    """Return what ``DYNLM_KERNEL`` asks for.

    Raises:
        InputError: it is none of the choices.
    """
    chosen = os.environ.get("DYNLM_KERNEL") or "auto"
    if chosen not in CHOICES:
        raise InputError(f"DYNLM_KERNEL is {chosen!r}: set it to one of {', '.join(CHOICES)}, or unset it")
    return chosen


def find_compiler() -> str | None:
    """The C compiler of this machine (``$CC``, gcc, clang or cc); None with ``DYNLM_KERNEL=eager`` or ``torch``."""
    if kernel_choice() in ("eager", "torch") or os.name != "posix":
        return None
    names = (os.environ.get("CC"), "gcc", "clang", "cc")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@functools.cache
def _tools(choice: str, cc: str | None, path: str | None) -> Toolchain | str:
    """Return what compiles in this environment, or why nothing does: looking takes longer than a small kernel runs."""
    compiler = find_compiler()
    if compiler is None:
        return f"DYNLM_KERNEL is {choice!r}" if choice in ("eager", "torch") else "no C compiler was found"
    return _probe(compiler)


def why_not() -> str | None:
    """The reason why nothing can be compiled here; None where a compiler works."""
    found = _tools(kernel_choice(), os.environ.get("CC"), os.environ.get("PATH"))
    return None if isinstance(found, Toolchain) else found


def supported(*tensors: Tensor) -> bool:
    """Return whether kernels exist for the tensors' devices and dtypes, and a compiler that builds them.

    Raises:
        InputError: ``DYNLM_KERNEL`` is compiled, and nothing can be.
    """
    if not all(t.is_cpu and t.dtype in TYPES for t in tensors):
        return False
    reason = why_not()
    if reason is not None:
        fall_back(reason)
    return reason is None


def fall_back(reason: str) -> None:
    """Note once that torch takes over, or raise where ``DYNLM_KERNEL`` insists on compiled kernels."""
    if kernel_choice() == "compiled":
        raise InputError(f"DYNLM_KERNEL is 'compiled', but {reason}: install gcc, or unset DYNLM_KERNEL")
    if kernel_choice() == "auto":
        note(f"{reason}: torch does the work instead, more slowly and with the same results (DYNLM_KERNEL=eager)")


def build(body: str, dtype: torch.dtype) -> ctypes.CDLL:
    """Return the library of one C source, in which ``T`` is ``dtype``, from the cache folder or freshly compiled.

    Raises:
        CompileError: the compiler's first error.
    """
    found = _tools(kernel_choice(), os.environ.get("CC"), os.environ.get("PATH"))
    if not isinstance(found, Toolchain):
        raise CompileError(found)
    return _build(body, dtype, found, TIME_LIMIT)


@functools.cache
def _build(body: str, dtype: torch.dtype, tools: Toolchain, limit: float) -> ctypes.CDLL:
    source = HEAD + TYPES[dtype] + body
    identity = [source, *tools.compile, "", *tools.link, tools.compiler, platform.machine(), _processor()]
    try:
        return library("\0".join([*identity, torch.__version__]), lambda: _compile(tools, source, limit))
    except OSError as error:
        raise CompileError(f"{tools.compiler} built no library that loads ({_printable(str(error))})") from error


@functools.cache
def _probe(compiler: str) -> Toolchain | str:
    """Return the most flags with which a small program builds and counts right, or the reason why none do."""
    reason = ""
    for tools in _toolchains(compiler):
        try:
            if _build(PROBE, torch.float64, tools, PROBE_LIMIT).probe(100) == 5050:
                return tools
            reason = f"{compiler} builds programs that compute wrongly"
        except AttributeError:
            reason = f"{compiler} built a library without the function that it was given"
        except CompileError as error:
            reason = str(error)
            if isinstance(error, TimeLimitError):
                break
    return reason


def _toolchains(compiler: str) -> Iterator[Toolchain]:
    """Threads matter more than the processor's own instructions; Apple's clang has no OpenMP, some have no 'native'."""
    # torch's own OpenMP library, where it brings one: two thread pools would fight for the cores
    bundled = sorted(str(path) for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    openmp = [(("-fopenmp",), (library,)) for library in (*bundled[:1], "-fopenmp")]
    for (threads, libraries), native in product([*openmp, ((), ())], [NATIVE, ()]):
        yield Toolchain(compiler, (*FLAGS, *threads, *native), (*libraries, "-lm"))


def _compile(tools: Toolchain, source: str, limit: float) -> bytes:
    with tempfile.TemporaryDirectory(prefix="dynlm-build-") as name:
        folder = Path(name)
        (folder / "kernel.c").write_text(source)
        _run([tools.compiler, *tools.compile, "-c", "kernel.c", "-o", "kernel.o"], folder, limit)
        _run([tools.compiler, "-shared", "kernel.o", "-o", "kernel.so", *tools.link], folder, limit)
        try:
            return (folder / "kernel.so").read_bytes()
        except FileNotFoundError:
            raise CompileError(f"{tools.compiler} reported success and wrote nothing") from None


def _run(command: list[str], folder: Path, limit: float) -> None:
    """One call of the compiler, in a session of its own: one that hangs is ended with all that it has started."""
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise TimeLimitError(f"{command[0]} was not done after {limit:g} seconds") from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        lines = log.read_bytes().decode("utf-8", "replace").splitlines()
        reason = next((line for line in lines if "error" in line), f"exit code {code}")
        raise CompileError(f"{command[0]} failed ({_printable(reason)})")


def _printable(text: str) -> str:
    """Make a compiler's output printable: it may hold anything, and be of any length."""
    return "".join(c if c.isprintable() else " " for c in text.strip())[:200]


@functools.cache
def _processor() -> str:
    """Return what ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("flags")), "")
