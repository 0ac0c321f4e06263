"""The one door into C: kernels whose arguments have names.

A :class:`Kernel` prints its own prototype from the names of its sizes, numbers and arrays, and a call gives each by its
name, so that they cannot be confused between Python and C. Before every call each array is compared with what it is
declared to be: dtype, shape, contiguity, device. What does not fit is one clear error, and C is not called.
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


class Long(NamedTuple):
    """A whole number, ``long`` in C, that seldom changes: the shapes of arrays are worked out once for all of them."""

    name: str


class Double(NamedTuple):
    """A number in double precision."""

    name: str


class Array(NamedTuple):
    """An array that a kernel reads or, as an ``out``, changes in place."""

    name: str
    shape: str = ""
    """its sizes by name, as numbers, and as their sums and products: ``"S + 1, B, 3 * D"``; none for a single number"""
    kind: Literal["T", "double", "int", "bf16"] = "T"
    """type of an entry; T is that of the call, float or double"""
    out: bool = False


Argument = Long | Double | Array
Given = Mapping[str, Tensor | float]
"""what a call gives, by name"""


class _Declared:
    """Arguments by kind, in the order in which C gets them."""

    def __init__(self, arguments: Sequence[Argument]) -> None:
        self.names = [argument.name for argument in arguments]
        self.sizes = [a.name for a in arguments if isinstance(a, Long)]
        self.numbers = [a.name for a in arguments if isinstance(a, Double)]
        self.arrays = [a for a in arguments if isinstance(a, Array)]
        self.plans: dict[tuple[Any, ...], _Plan] = {}

    def lines(self, at: Sequence[str] = ("", "", "")) -> list[str]:
        """Return C that declares them; ``at`` is where its sizes, numbers and arrays begin."""
        lines = [f"const long {name} = sizes[{at[0]}{i}];" for i, name in enumerate(self.sizes)]
        lines += [f"const double {name} = numbers[{at[1]}{i}];" for i, name in enumerate(self.numbers)]
        for i, array in enumerate(self.arrays):
            constant = "" if array.out else "const "
            lines.append(f"{constant}{array.kind} *restrict {array.name} = arrays[{at[2]}{i}];")
        return lines


class _Values(NamedTuple):
    """What C gets."""

    sizes: list[int]
    numbers: list[float]
    addresses: list[int]
    kept: list[Tensor]
    """copies that must outlive the call"""


class Kernel:
    """A function in C. It holds text alone, so it can be copied and pickled.

    Args:
        name: the function's.
        body: its C, which finds all that follows declared, arrays as pointers.
        arguments: those that come once.
        each: those that each of n tensors has; ``EACH(k)`` in the body declares those of tensor k.
        head: C before the function.
    """

    def __init__(
        self, name: str, body: str, arguments: Sequence[Argument], each: Sequence[Argument] = (), head: str = ""
    ) -> None:
        self.name, self.once, self.each = name, _Declared(arguments), _Declared(each)
        both = [(getattr(self.once, kind), getattr(self.each, kind)) for kind in ("sizes", "numbers", "arrays")]
        of_each = self.each.lines([f"{len(once)} + {len(each)} * (k) + " for once, each in both])
        self.source = "\n".join(
            [
                head,
                f"#define EACH(k) {' '.join(of_each)}",
                f"void {name}(long n, const long *sizes, const double *numbers, void *const *arrays) {{",
                *(f"  {line}" for line in self.once.lines()),
                body,
                "}",
                "",
            ]
        )

    def serves(self, *tensors: Tensor) -> bool:
        """Return whether the kernel exists for the tensors' dtype and devices; otherwise its plain form is due."""
        return supported(*tensors) and self.builds(tensors[0].dtype)

    def builds(self, dtype: torch.dtype) -> bool:
        """Return the part of :meth:`serves` that is this kernel's own; a failure is noted once."""
        return _function(self, dtype) is not None

    def __call__(self, given: Given, each: Sequence[Given] = ()) -> None:
        """Run on these arguments; ``out`` arrays change in place and share their memory with no other.

        Of an array that is only read, a copy is taken where it is not contiguous or its sign is kept apart.

        Raises:
            InputError: an argument is missing, or is not what its declaration says; nothing has run.
        """
        values = _Values([], [], [], [])
        key: tuple[Any, ...] = (self._dtype(given, each), len(each))
        self._read(self.once, given, key, values)
        key += (*values.sizes,)
        for k, of_tensor in enumerate(each):
            self._read(self.each, of_tensor, key, values, f" of tensor {k}")
        function = _function(self, key[0])
        if function is None:
            raise InputError(f"kernel {self.name!r} could not be built: set DYNLM_KERNEL=eager to go on without it")
        function(
            ctypes.c_long(len(each)),
            (ctypes.c_long * len(values.sizes))(*values.sizes),
            (ctypes.c_double * len(values.numbers))(*values.numbers),
            (ctypes.c_void_p * len(values.addresses))(*values.addresses),
        )

    def _dtype(self, given: Given, each: Sequence[Given]) -> torch.dtype:
        """Return what T is: the dtype of the first array of that type."""
        for declared, of_one in ((self.once, given), *((self.each, of_tensor) for of_tensor in each[:1])):
            for array in declared.arrays:
                if array.kind == "T" and isinstance(first := of_one.get(array.name), Tensor):
                    if first.dtype in TYPES:
                        return first.dtype
                    raise InputError(
                        f"kernel {self.name!r} takes {array.name} as float32 or float64, not {_name(first.dtype)}"
                    )
        raise InputError(f"kernel {self.name!r} got no array of numbers")

    def _read(self, declared: _Declared, given: Given, key: tuple[Any, ...], values: _Values, where: str = "") -> None:
        """Add what is given to ``values``, in the order of the declarations, once all of it fits."""
        if len(given) != len(declared.names):
            raise InputError(f"kernel {self.name!r} takes {declared.names}{where} and got {list(given)}")
        sizes: list[Any] = [given.get(name) for name in declared.sizes]
        numbers: list[Any] = [given.get(name) for name in declared.numbers]
        for name, value in zip(declared.sizes + declared.numbers, sizes + numbers, strict=True):
            if not isinstance(value, int) and (name in declared.sizes or not isinstance(value, float)):
                expected = "a whole number" if name in declared.sizes else "a number"
                raise InputError(f"kernel {self.name!r} takes {name}{where} as {expected}, and got {_shown(value)}")
        values.sizes.extend(sizes)
        values.numbers.extend(numbers)
        plan = declared.plans.get((*key, *sizes))
        if plan is None:
            plan = self._plan(declared, *key, *sizes)
        for name, dtype, shape, out in plan:
            array: Any = given.get(name)
            try:
                if array.dtype is dtype and array.shape == shape and array.is_cpu:
                    lies_right = array.is_contiguous() and not array.is_neg()
                    if not lies_right and not out:
                        array = array.contiguous().resolve_neg()
                        values.kept.append(array)
                    address = array.data_ptr()
                    if (lies_right or not out) and (address or not array.numel()):
                        values.addresses.append(address)
                        continue
            except (AttributeError, RuntimeError):  # no tensor, or one without memory of its own, as while tracing
                pass
            expected = f"{_name(dtype)} {list(shape)}, contiguous, on the CPU"
            raise InputError(f"kernel {self.name!r} takes {name}{where} as {expected}, and got {_shown(array)}")

    def _plan(self, declared: _Declared, dtype: torch.dtype, *sizes: int) -> _Plan:
        """Return name, dtype and shape of each array at these sizes, and whether it changes."""
        names = ("n", *self.once.sizes, *(self.each.sizes if declared is self.each else ()))
        named, plan = dict(zip(names, sizes, strict=True)), []
        for array in declared.arrays:
            shape = torch.Size(_extent(text, named) for text in array.shape.split(",") if text)
            plan.append((array.name, KINDS.get(array.kind, dtype), shape, array.out))
        if len(declared.plans) >= MOST_PLANS:
            declared.plans.clear()
        declared.plans[dtype, *sizes] = plan
        return plan


_built: dict[tuple[str, torch.dtype], Any] = {}
"""Functions by the source of their kernel: what is built once serves until the process ends."""


def _function(kernel: Kernel, dtype: torch.dtype) -> Any:
    """Return the function in C, or None and a note."""
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
    """Return a sum of products of names and whole numbers."""
    products = ([factor.strip() for factor in term.split("*")] for term in text.split("+"))
    return sum(math.prod(int(f) if f.isdigit() else sizes[f] for f in factors) for factors in products)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(array: object) -> str:
    if not isinstance(array, Tensor):
        return type(array).__name__
    layout = str(array.layout).removeprefix("torch.")
    if layout == "strided":
        layout = "contiguous" if array.is_contiguous() else "not contiguous"
    return f"{_name(array.dtype)} {list(array.shape)}, {layout}, on {array.device}"
