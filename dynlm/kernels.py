"""The one door into C: kernels whose sizes, numbers and arrays have names.

A :class:`Kernel` prints its own prototype from these names, so that they cannot be confused between Python and C, and
before every call it compares each array with what it declares: dtype, shape, contiguity, device. What does not fit is
one clear error, and C is not called.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dynlm.compiler import TYPES, CompileError, build, fall_back, find_compiler, supported
from dynlm.types import InputError

KINDS = {"double": torch.float64, "int": torch.int32, "bf16": torch.bfloat16}
MOST_PLANS = 1000  # of sizes that are remembered


class Array(NamedTuple):
    """An array that a kernel reads or, as an ``out``, changes in place."""

    name: str
    shape: str = ""
    """its sizes by name, as numbers, and as their sums and products: ``"S + 1, B, 3 * D"``; none for a single number"""
    kind: Literal["T", "double", "int", "bf16"] = "T"
    """type of an entry; T is that of the call, float or double"""
    out: bool = False


class Each(NamedTuple):
    """The sizes and arrays of one of the n tensors that a kernel works on."""

    sizes: Sequence[int]
    arrays: Mapping[str, Tensor]


class _Declared(NamedTuple):
    sizes: tuple[str, ...]
    arrays: tuple[Array, ...]


class Kernel:
    """A function in C. It holds text alone, so it can be copied and pickled.

    Args:
        name: the function's.
        body: its C, which finds all that follows declared: whole numbers as ``long``, arrays as pointers.
        sizes: names of whole numbers.
        numbers: names of numbers in double precision.
        arrays: arrays that come once.
        each_sizes: names of whole numbers that each of n tensors has; ``EACH(k)`` in the body declares those of
            tensor k.
        each: arrays that each of them has.
        head: C before the function.
    """

    def __init__(
        self,
        name: str,
        body: str,
        *,
        sizes: Sequence[str] = (),
        numbers: Sequence[str] = (),
        arrays: Sequence[Array] = (),
        each_sizes: Sequence[str] = (),
        each: Sequence[Array] = (),
        head: str = "",
    ) -> None:
        self.name, self.numbers = name, tuple(numbers)
        self.once, self.each = _Declared(tuple(sizes), tuple(arrays)), _Declared(tuple(each_sizes), tuple(each))
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        once = [*_declarations(self.once), *(f"const double {x} = numbers[{i}];" for i, x in enumerate(numbers))]
        of_each = _declarations(
            self.each, f"{len(sizes)} + {len(each_sizes)} * (k) + ", f"{len(arrays)} + {len(each)} * (k) + "
        )
        self.source = "\n".join(
            [
                head,
                f"#define EACH(k) {' '.join(of_each)}",
                f"void {name}(long n, const long *sizes, const double *numbers, void *const *arrays) {{",
                *(f"  {line}" for line in once),
                body,
                "}",
                "",
            ]
        )

    def serves(self, *tensors: Tensor) -> bool:
        """Whether the kernel exists for the tensors' dtype and devices; where it does not, its plain form is due."""
        return supported(*tensors) and self.builds(tensors[0].dtype)

    def builds(self, dtype: torch.dtype) -> bool:
        """The part of :meth:`serves` that is this kernel's own; a failure is noted once."""
        return _function(self, dtype) is not None

    def __call__(
        self,
        sizes: Sequence[int],
        arrays: Mapping[str, Tensor],
        *,
        numbers: Sequence[float] = (),
        each: Sequence[Each] = (),
    ) -> None:
        """Run on these arrays, of which the ``out`` ones change in place and share their memory with no other.

        Of an array that is only read, a copy is taken where it is not contiguous or its sign is kept apart.

        Raises:
            InputError: an array is missing, or is not what its declaration says; nothing has run.
        """
        dtype, n, values = self._dtype(arrays, each), len(each), list(sizes)
        common, kept = (*sizes, n), list[Tensor]()
        addresses = self._addresses(self.once, arrays, (dtype, common), kept)
        for k, (own, of_tensor) in enumerate(each):
            addresses += self._addresses(self.each, of_tensor, (dtype, common, *own), kept, k)
            values += own
        if len(numbers) != len(self.numbers):
            raise InputError(f"kernel {self.name!r} takes the numbers {self.numbers} and got {len(numbers)}")
        function = _function(self, dtype)
        if function is None:
            raise InputError(f"kernel {self.name!r} could not be built: set DYNLM_KERNEL=eager to go on without it")
        function(
            ctypes.c_long(n),
            (ctypes.c_long * len(values))(*values),
            (ctypes.c_double * len(numbers))(*numbers),
            (ctypes.c_void_p * len(addresses))(*addresses),
        )

    def _dtype(self, arrays: Mapping[str, Tensor], each: Sequence[Each]) -> torch.dtype:
        """What T is: the dtype of the first array of that type."""
        for declared, given in ((self.once, arrays), *((self.each, of_tensor.arrays) for of_tensor in each[:1])):
            for array in declared.arrays:
                if array.kind == "T" and isinstance(first := given.get(array.name), Tensor):
                    if first.dtype in TYPES:
                        return first.dtype
                    raise InputError(
                        f"kernel {self.name!r} takes {array.name} as float32 or float64, not {_name(first.dtype)}"
                    )
        raise InputError(f"kernel {self.name!r} got no array of numbers")

    def _addresses(
        self,
        declared: _Declared,
        arrays: Mapping[str, Tensor],
        key: tuple[Any, ...],
        kept: list[Tensor],
        k: int | None = None,
    ) -> list[int]:
        """Where the arrays lie, in the order of their declarations, once all of them fit; copies are ``kept``."""
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._plan(declared, *key)
        where, addresses = "" if k is None else f" of tensor {k}", []
        if len(arrays) != len(plan):
            names = [array.name for array in declared.arrays]
            raise InputError(f"kernel {self.name!r} takes the arrays {names}{where} and got {list(arrays)}")
        for name, dtype, shape, out in plan:
            array: Any = arrays.get(name)
            try:
                if array.dtype is dtype and array.shape == shape and array.is_cpu:
                    lies_right = array.is_contiguous() and not array.is_neg()
                    if not lies_right and not out:
                        array = array.contiguous().resolve_neg()
                        kept.append(array)
                    address = array.data_ptr()
                    if (lies_right or not out) and (address or not array.numel()):
                        addresses.append(address)
                        continue
            except (AttributeError, RuntimeError):  # no tensor, or one without memory of its own, as while tracing
                pass
            expected = f"{_name(dtype)} {list(shape)}, contiguous, on the CPU"
            raise InputError(f"kernel {self.name!r} takes {name}{where} as {expected}, and got {_shown(array)}")
        return addresses

    def _plan(self, declared: _Declared, dtype: torch.dtype, common: tuple[int, ...], *own: int) -> _Plan:
        """Name, dtype and shape of each array at these sizes, and whether it changes."""
        names = (*self.once.sizes, "n", *(self.each.sizes if declared is self.each else ()))
        sizes = dict(zip(names, (*common, *own), strict=True))
        plan = []
        for array in declared.arrays:
            shape = torch.Size(_extent(text, sizes) for text in array.shape.split(",") if text)
            plan.append((array.name, KINDS.get(array.kind, dtype), shape, array.out))
        return plan


_built: dict[tuple[str, torch.dtype], Any] = {}
"""Functions by the source of their kernel: what is built once serves until the process ends."""


def _function(kernel: Kernel, dtype: torch.dtype) -> Any:
    """The function in C, or None and a note."""
    key = (kernel.source, dtype)
    built = _built.get(key)
    return _try_to_build(*key, kernel.name, find_compiler()) if built is None else built


@functools.cache
def _try_to_build(source: str, dtype: torch.dtype, name: str, compiler: str | None) -> Any:
    try:
        _built[source, dtype] = function = getattr(build(source, dtype), name)
        return function
    except CompileError as error:
        fall_back(str(error))
    except AttributeError:
        fall_back(f"{compiler} built a library without its function")
    return None


_Plan = list[tuple[str, torch.dtype, torch.Size, bool]]


def _extent(text: str, sizes: Mapping[str, int]) -> int:
    """A sum of products of names and whole numbers."""
    products = ([factor.strip() for factor in term.split("*")] for term in text.split("+"))
    return sum(math.prod(int(f) if f.isdigit() else sizes[f] for f in factors) for factors in products)


def _declarations(declared: _Declared, size_at: str = "", array_at: str = "") -> list[str]:
    lines = [f"const long {name} = sizes[{size_at}{i}];" for i, name in enumerate(declared.sizes)]
    for i, array in enumerate(declared.arrays):
        constant = "" if array.out else "const "
        lines.append(f"{constant}{array.kind} *restrict {array.name} = arrays[{array_at}{i}];")
    return lines


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(array: object) -> str:
    if not isinstance(array, Tensor):
        return type(array).__name__
    layout = str(array.layout).removeprefix("torch.")
    if layout == "strided":
        layout = "contiguous" if array.is_contiguous() else "not contiguous"
    return f"{_name(array.dtype)} {list(array.shape)}, {layout}, on {array.device}"
