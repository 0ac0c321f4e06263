"""The fused step: one pass over memory that updates weights and state in place.

The plain reference is ``Rule.update``. The fast path is the same ``Rule.step``, traced into C (dynlm.optim.trace),
built by the machine's C compiler in a second or two and kept in a cache folder. Without a compiler, on other devices
and dtypes, or with ``DYNLM_KERNEL=eager``, the same call runs in torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dynlm.optim.base import Coordinates, Observation, Prior, Rule, RuleState, Slots
from dynlm.optim.trace import to_c
from dynlm.runs import replacing
from dynlm.types import InputError

C_TYPES = {
    torch.float32: "typedef float T;\n#define ABS fabsf\n#define SQRT sqrtf\n",
    torch.float64: "typedef double T;\n#define ABS fabs\n#define SQRT sqrt\n",
}
# reassociation and reciprocals, but NaN and infinity keep their meaning; the link step must not see -ffast-math, which
# would switch off denormals for the whole process
FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-ffast-math", "-fno-finite-math-only") + (
    ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
)
Kernel = Callable[[Coordinates, Slots, Tensor], None]


def find_compiler() -> str | None:
    """The C compiler of this machine (``$CC``, gcc, clang or cc), or None; ``DYNLM_KERNEL=eager`` says None."""
    if os.environ.get("DYNLM_KERNEL") == "eager":
        return None
    names = (os.environ.get("CC"), "gcc", "clang", "cc")
    return next((path for name in names if name and (path := shutil.which(name))), None)


class FusedStep:
    """Applies a rule in place, tensor by tensor. Holds no state of its own."""

    def __init__(self, rule: Rule, compiled: bool | None = None) -> None:
        self.rule = rule
        if compiled and find_compiler() is None:
            raise InputError("read.kernel is 'compiled', but no C compiler was found: install gcc, or use 'auto'")
        self.compiled = find_compiler() is not None if compiled is None else compiled
        self._kernels: dict[tuple[object, ...], Kernel] = {}

    @torch.no_grad()
    def __call__(
        self, thetas: Sequence[Tensor], grads: Sequence[Tensor], state: RuleState, priors: Sequence[Prior]
    ) -> list[Observation]:
        """Update ``thetas`` and ``state`` in place; returns what was observed, for those who record it."""
        seen = []
        for i, (theta, grad, prior) in enumerate(zip(thetas, grads, priors, strict=True)):
            observation, state.memory[i] = self.rule.observe(grad, prior, state.memory[i], state.clock)
            context = self.rule.context(prior, observation, state.clock)
            w = Coordinates(theta, prior.theta0, prior.rms, grad, observation.row, observation.col)
            if self.compiled and theta.device.type == "cpu" and theta.dtype in C_TYPES:
                self._kernel(w, context)(w, state.slots[i], _flat(context, theta))
            else:
                _plain_step(self.rule, w, state.slots[i], context)
            seen.append(observation)
        return seen

    def _kernel(self, w: Coordinates, context: Slots) -> Kernel:
        key = (w.theta.dtype, len(w.row), len(w.col), *(tuple(t.shape) for t in context))
        if key not in self._kernels:
            source = C_TYPES[w.theta.dtype] + to_c(self.rule, len(w.row), len(w.col), context)
            self._kernels[key] = _build(source)
        return self._kernels[key]


def _plain_step(rule: Rule, w: Coordinates, slots: Slots, context: Slots) -> None:
    theta, new_slots = rule.step(w, slots, context)
    w.theta.copy_(theta)
    for slot, new in zip(slots, new_slots, strict=True):
        slot.copy_(new)


def _flat(context: Slots, like: Tensor) -> Tensor:
    if not context:
        return like.new_empty(0)
    return torch.cat([t.reshape(-1).to(like) for t in context])


@functools.cache
def _build(source: str) -> Kernel:
    """The function of one C source, from the cache folder or freshly compiled."""
    compiler = find_compiler()
    assert compiler is not None
    source = "#include <math.h>\n" + source
    identity = "\0".join([source, *FLAGS, compiler, platform.machine(), _processor(), torch.__version__])
    path = _cache_folder() / f"step-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    if not path.is_file():
        with replacing(path) as temporary:
            code, middle = temporary.with_suffix(".c"), temporary.with_suffix(".o")
            code.write_text(source)
            # torch's own OpenMP library, where it brings one: two thread pools would fight for the cores
            bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
            libraries = [str(bundled[0])] if bundled else ["-fopenmp"]
            for command in (
                [compiler, *FLAGS, "-c", str(code), "-o", str(middle)],
                [compiler, "-shared", str(middle), "-o", str(temporary), *libraries, "-lm"],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    reason = (done.stderr.strip().splitlines() or ["no message"])[0]
                    raise InputError(f"{compiler} failed ({reason}): set DYNLM_KERNEL=eager to go on without it")
    return _call(ctypes.CDLL(str(path)).step)


def _call(function: Callable[..., None]) -> Kernel:
    def kernel(w: Coordinates, slots: Slots, context: Tensor) -> None:
        tensors = [w.theta, w.theta0, w.rms, w.grad, *slots, *w.row, *w.col]
        tensors = [t if t.is_contiguous() else t.contiguous() for t in tensors]
        assert tensors[0] is w.theta, "weights must be contiguous to change in place"
        pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
        rows, columns = w.theta.shape
        threads = ctypes.c_int(torch.get_num_threads())
        function(ctypes.c_long(rows), ctypes.c_long(columns), threads, ctypes.c_void_p(context.data_ptr()), pointers)

    return kernel


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
