"""The one door into C: kernels whose arguments have names.

A :class:`Kernel` prints its own prototype from the names of its sizes, numbers and arrays, and a call gives each by its
name, so that they cannot be confused between Python and C. Before every call each array is compared with what it is
declared to be: dtype, shape, contiguity, device. What does not fit is one clear error, and C is not called.
"""

from __future__ import annotations

import ctypes
import functools
import math
from array import array as packed
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
Columns = Mapping[str, Sequence[Tensor] | Sequence[float]]
"""what it gives of n tensors, by name: n entries each"""


class Column(tuple[Tensor, ...]):
    """Arrays of n tensors that come again, and whose memory stays where it is: each is looked at once."""

    _known: tuple[torch.dtype, Sequence[torch.Size], Sequence[int]] | None = None

    def where(self, dtype: torch.dtype, shapes: Sequence[torch.Size]) -> Sequence[int]:
        """Return the addresses; nothing where an array is not as it should be."""
        if self._known and self._known[0] is dtype and self._known[1] == shapes:
            return self._known[2]
        addresses = _where(self, dtype, shapes)
        self._known = (dtype, shapes, addresses) if addresses else None
        return addresses


class _Declared:
    """Arguments by kind, in the order in which C gets them."""

    def __init__(self, arguments: Sequence[Argument]) -> None:
        self.names = [argument.name for argument in arguments]
        self.sizes = [a.name for a in arguments if isinstance(a, Long)]
        self.numbers = [a.name for a in arguments if isinstance(a, Double)]
        self.arrays = [a for a in arguments if isinstance(a, Array)]
        self.plans: dict[tuple[Any, ...], _Plan] = {}

    def lines(self, at: Sequence[str] = ("{}", "{}", "{}")) -> list[str]:
        """Return C that declares them; ``at`` is where its sizes, numbers and arrays lie, by their place."""
        lines = [f"const long {name} = sizes[{at[0].format(i)}];" for i, name in enumerate(self.sizes)]
        lines += [f"const double {name} = numbers[{at[1].format(i)}];" for i, name in enumerate(self.numbers)]
        for i, array in enumerate(self.arrays):
            constant = "" if array.out else "const "
            lines.append(f"{constant}{array.kind} *restrict {array.name} = arrays[{at[2].format(i)}];")
        return lines


class _Values(NamedTuple):
    """What C gets."""

    sizes: packed[int]
    numbers: packed[float]
    addresses: packed[int]
    kept: list[Tensor]
    """copies that must outlive the call"""


class Kernel:
    """A function in C. It holds text alone, so it can be copied and pickled.

    Args:
        name: the function's.
        body: its C, which finds all that follows declared, arrays as pointers.
        arguments: those that come once.
        each: those that each of n tensors has, given as columns; ``EACH(k)`` in the body declares those of tensor k.
        head: C before the function.
    """

    def __init__(
        self, name: str, body: str, arguments: Sequence[Argument], each: Sequence[Argument] = (), head: str = ""
    ) -> None:
        self.name, self.once, self.each = name, _Declared(arguments), _Declared(each)
        self._known: tuple[Any, list[Sequence[torch.Size]], packed[int]] | None = None  # of the last sizes of n tensors
        before = [len(kind) for kind in (self.once.sizes, self.once.numbers, self.once.arrays)]
        of_each = self.each.lines([f"{n} + {{}} * n + (k)" for n in before])
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

    def __call__(self, given: Given, each: Columns | None = None) -> None:
        """Run on these arguments; ``out`` arrays change in place and share their memory with no other.

        Of an array that is only read, a copy is taken where it is not contiguous or its sign is kept apart.

        Raises:
            InputError: an argument is missing, or is not what its declaration says; nothing has run.
        """
        values, each = _Values(packed("l"), packed("d"), packed("L"), []), each or {}
        n = max(map(len, each.values()), default=0)
        key: tuple[Any, ...] = (self._dtype(given, each), n)
        self._read(given, key, values)
        if n:
            self._read_each(each, (*key, *values.sizes), values)
        function = _function(self, key[0])
        if function is None:
            raise InputError(f"kernel {self.name!r} could not be built: set DYNLM_KERNEL=eager to go on without it")
        function(ctypes.c_long(n), *(ctypes.c_void_p(numbers.buffer_info()[0]) for numbers in values[:3]))

    def _dtype(self, given: Given, each: Columns) -> torch.dtype:
        """Return what T is: the dtype of the first array of that type."""
        firsts: list[tuple[Array, object]] = [(array, given.get(array.name)) for array in self.once.arrays]
        firsts += [(array, next(iter(each.get(array.name, ())), None)) for array in self.each.arrays]
        for array, first in firsts:
            if array.kind == "T" and isinstance(first, Tensor):
                if first.dtype in TYPES:
                    return first.dtype
                raise InputError(
                    f"kernel {self.name!r} takes {array.name} as float32 or float64, not {_name(first.dtype)}"
                )
        raise InputError(f"kernel {self.name!r} got no array of numbers")

    def _read(self, given: Given, key: tuple[Any, ...], values: _Values) -> None:
        """Add what is given once to ``values``, in the order of the declarations, once all of it fits."""
        declared = self.once
        self._check_names(declared, given)
        values.sizes.extend(self._size(name, given.get(name)) for name in declared.sizes)
        values.numbers.extend(self._number(name, given.get(name)) for name in declared.numbers)
        for array, shape in zip(declared.arrays, self._shapes(declared, (*key, *values.sizes)), strict=True):
            dtype = KINDS.get(array.kind, key[0])
            values.addresses.append(self._address(array, given.get(array.name), dtype, shape, values))

    def _read_each(self, each: Columns, key: tuple[Any, ...], values: _Values) -> None:
        """The same of what n tensors have, array by array: one that lies right in all of them is looked at quickly."""
        declared, n = self.each, key[1]
        self._check_names(declared, each, " of tensor 0")
        columns = {name: column for name, column in each.items() if len(column) == n}
        blank = (None,) * n  # stands for what is missing, so that it is told as any other fault
        sizes = [tuple(columns.get(name, blank)) for name in declared.sizes]
        known, whole = self._known, all({*map(type, column)} == {int} for column in sizes)
        if known is None or not whole or known[0] != (key, sizes):
            shapes = self._shapes_each(key, sizes)
            self._known = known = (key, sizes), shapes, packed("l", [size for column in sizes for size in column])
        values.sizes.extend(known[2])
        for name in declared.numbers:
            values.numbers.extend(self._numbers_each(name, columns.get(name, blank)))
        for array, shapes_n in zip(declared.arrays, known[1], strict=True):
            dtype, given = KINDS.get(array.kind, key[0]), columns.get(array.name, blank)
            addresses = given.where(dtype, shapes_n) if isinstance(given, Column) else _where(given, dtype, shapes_n)
            values.addresses.extend(
                addresses
                or [
                    self._address(array, one, dtype, shape, values, f" of tensor {k}")
                    for k, (one, shape) in enumerate(zip(given, shapes_n, strict=True))
                ]
            )

    def _shapes_each(self, key: tuple[Any, ...], of_sizes: Sequence[Sequence[Any]]) -> list[Sequence[torch.Size]]:
        """Return the shapes of each array in n tensors, from n of each size."""
        for name, column in zip(self.each.sizes, of_sizes, strict=True):
            for k, value in enumerate(column):
                self._size(name, value, f" of tensor {k}")
        sizes = list(zip(*of_sizes, strict=True)) or [()] * key[1]
        shapes_of = {one: self._shapes(self.each, (*key, *one)) for one in set(sizes)}
        return list(zip(*(shapes_of[one] for one in sizes), strict=True))

    def _numbers_each(self, name: str, column: Sequence[Any]) -> Sequence[float]:
        if {*map(type, column)} <= {int, float}:
            return column
        return [self._number(name, value, f" of tensor {k}") for k, value in enumerate(column)]

    def _check_names(self, declared: _Declared, given: Given | Columns, where: str = "") -> None:
        if len(given) != len(declared.names):
            raise InputError(f"kernel {self.name!r} takes {declared.names}{where} and got {list(given)}")

    def _size(self, name: str, value: Any, where: str = "") -> int:
        if not isinstance(value, int):
            raise InputError(f"kernel {self.name!r} takes {name}{where} as a whole number, and got {_shown(value)}")
        return value

    def _number(self, name: str, value: Any, where: str = "") -> float:
        if not isinstance(value, int | float):
            raise InputError(f"kernel {self.name!r} takes {name}{where} as a number, and got {_shown(value)}")
        return value

    def _address(
        self, array: Array, given: Any, dtype: torch.dtype, shape: torch.Size, values: _Values, where: str = ""
    ) -> int:
        """Return where an array lies, or a copy of one that is only read."""
        try:
            if given.dtype is dtype and given.shape == shape and given.is_cpu:
                lies_right = given.is_contiguous() and not given.is_neg()
                if not lies_right and not array.out:
                    given = given.contiguous().resolve_neg()
                    values.kept.append(given)
                address: int = given.data_ptr()
                if (lies_right or not array.out) and (address or not given.numel()):
                    return address
        except (AttributeError, RuntimeError):  # no tensor, or one without memory of its own, as while tracing
            pass
        expected = f"{_name(dtype)} {list(shape)}, contiguous, on the CPU"
        raise InputError(f"kernel {self.name!r} takes {array.name}{where} as {expected}, and got {_shown(given)}")

    def _shapes(self, declared: _Declared, key: tuple[Any, ...]) -> _Plan:
        plan = declared.plans.get(key)
        return self._plan(declared, *key) if plan is None else plan

    def _plan(self, declared: _Declared, dtype: torch.dtype, *sizes: int) -> _Plan:
        """Return the shape of each array at these sizes."""
        names = ("n", *self.once.sizes, *(self.each.sizes if declared is self.each else ()))
        named = dict(zip(names, sizes, strict=True))
        plan = [torch.Size(_extent(text, named) for text in a.shape.split(",") if text) for a in declared.arrays]
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


_Plan = list[torch.Size]


def _where(column: Sequence[Any], dtype: torch.dtype, shapes: Sequence[torch.Size]) -> packed[int]:
    """Return the addresses of arrays that are all right; nothing where one is not."""
    try:
        addresses = [
            t.data_ptr()
            for t, shape in zip(column, shapes, strict=True)
            if t.dtype is dtype and t.shape == shape and t.is_cpu and t.is_contiguous() and not t.is_neg()
        ]
    except (AttributeError, RuntimeError):
        addresses = []
    return packed("L", addresses if len(addresses) == len(column) and all(addresses) else [])


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
