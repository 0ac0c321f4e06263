"""Building C source into functions, once a machine: the cache folder keeps them.

Used for fused rules (dynlm.optim.kernel) and the LSTM's backward pass (dynlm.models.recurrence); each has a plain form.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynlm.runs import replacing
from dynlm.types import InputError

# reassociation and reciprocals, but NaN and infinity keep their meaning; the link step must not see -ffast-math, which
# would switch off denormals for the whole process
FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-ffast-math", "-fno-finite-math-only") + (
    ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
)


def find_compiler() -> str | None:
    """The C compiler of this machine (``$CC``, gcc, clang or cc); None with ``DYNLM_KERNEL=eager`` or ``torch``."""
    return _find_compiler(*(os.environ.get(name) for name in ("DYNLM_KERNEL", "CC", "PATH")))


@functools.cache
def _find_compiler(kernel: str | None, cc: str | None, path: str | None) -> str | None:
    """Searching the path takes longer than a small kernel runs, so it is done once for each environment."""
    if kernel in ("eager", "torch"):
        return None
    return next((found for name in (cc, "gcc", "clang", "cc") if name and (found := shutil.which(name))), None)


TYPES = {
    torch.float32: "typedef float T;\n#define ABS fabsf\n#define SQRT sqrtf\n#define LOG2 log2f\n",
    torch.float64: "typedef double T;\n#define ABS fabs\n#define SQRT sqrt\n#define LOG2 log2\n",
}
HEAD = "#include <math.h>\n#include <stdlib.h>\n#include <omp.h>\n"


def supported(*tensors: Tensor) -> bool:
    """Whether kernels exist for the tensors' devices and dtypes, and a compiler to build them."""
    return all(t.is_cpu and t.dtype in TYPES for t in tensors) and find_compiler() is not None


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """The address of a contiguous tensor, which the caller keeps alive."""
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def pointers(tensors: Sequence[Tensor]) -> Any:
    """A C array of the addresses of contiguous tensors."""
    assert all(t.is_contiguous() for t in tensors)
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


@functools.cache
def build(body: str, dtype: torch.dtype) -> ctypes.CDLL:
    """The library of one C source, in which ``T`` is ``dtype``, from the cache folder or freshly compiled.

    Raises:
        InputError: the compiler's first line, and how to go on without it.
    """
    compiler = find_compiler()
    assert compiler is not None
    source = HEAD + TYPES[dtype] + body
    identity = "\0".join([source, *FLAGS, compiler, platform.machine(), _processor(), torch.__version__])
    path = _cache_folder() / f"kernel-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    if not path.is_file():
        with replacing(path) as temporary:
            _compile(compiler, source, temporary)
    return ctypes.CDLL(str(path))


def _compile(compiler: str, source: str, target: Path) -> None:
    code, middle = target.with_suffix(".c"), target.with_suffix(".o")
    code.write_text(source)
    # torch's own OpenMP library, where it brings one: two thread pools would fight for the cores
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    libraries = [str(bundled[0])] if bundled else ["-fopenmp"]
    for command in (
        [compiler, *FLAGS, "-c", str(code), "-o", str(middle)],
        [compiler, "-shared", str(middle), "-o", str(target), *libraries, "-lm"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise InputError(f"{compiler} failed ({reason.strip()}): set DYNLM_KERNEL=eager to go on without it")


def _cache_folder() -> Path:
    """``$XDG_CACHE_HOME/dynlm`` or ``~/.cache/dynlm``: the user's own, since code is loaded from it."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dynlm"


@functools.cache
def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("flags")), "")
