"""Tracing ``Rule.step`` into C: one loop over coordinates, everything in registers.

``step`` is called once with symbols in place of tensors. Arithmetic on symbols records a program without repeated
subexpressions, which is printed as one C function. Why not ``torch.compile``: on the gated rule it took 37 to 160 s to
compile and ran 3 to 6 times slower (docs/LOG.md); this takes a second or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dynlm.optim.base import Coordinates, Rule

BLOCK = 1024  # columns a thread takes at a time

UNARY = {"neg": "-{0}", "abs": "ABS({0})", "sqrt": "SQRT({0})"}
BINARY = {"add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}"}
CLAMP = {"min": "({0} > {1} ? {1} : {0})", "max": "({0} < {1} ? {1} : {0})"}  # a NaN stays a NaN, as in torch
CODE = {**UNARY, **BINARY, **CLAMP}


class Symbol:
    """A value a coordinate, or a setting that all share. Supports what ``step`` may use, and nothing else."""

    def __init__(self, program: Program, name: str) -> None:
        self.program, self.name = program, name

    def _apply(self, op: str, *others: Symbol | float) -> Symbol:
        return self.program.emit(op, self, *others)

    def __add__(self, other: Symbol | float) -> Symbol:
        return self._apply("add", other)

    def __sub__(self, other: Symbol | float) -> Symbol:
        return self._apply("sub", other)

    def __mul__(self, other: Symbol | float) -> Symbol:
        return self._apply("mul", other)

    def __truediv__(self, other: Symbol | float) -> Symbol:
        return self._apply("div", other)

    def __radd__(self, other: float) -> Symbol:
        return self.program.emit("add", other, self)

    def __rsub__(self, other: float) -> Symbol:
        return self.program.emit("sub", other, self)

    def __rmul__(self, other: float) -> Symbol:
        return self.program.emit("mul", other, self)

    def __rtruediv__(self, other: float) -> Symbol:
        return self.program.emit("div", other, self)

    def __neg__(self) -> Symbol:
        return self._apply("neg")

    def abs(self) -> Symbol:
        return self._apply("abs")

    def sqrt(self) -> Symbol:
        return self._apply("sqrt")

    def square(self) -> Symbol:
        return self * self

    def clamp(self, min: float | None = None, max: float | None = None) -> Symbol:
        lower = self if min is None else self._apply("max", min)
        return lower if max is None else lower._apply("min", max)


class SymbolArray:
    """A context tensor whose entries are symbols: indexing, ``unbind`` and ``shape`` as in torch."""

    def __init__(self, program: Program, shape: tuple[int, ...], offset: int) -> None:
        self.program, self.shape, self.offset = program, shape, offset

    def __getitem__(self, index: int | tuple[int, ...]) -> Any:
        first, *rest = index if isinstance(index, tuple) else (index,)
        stride = 1
        for n in self.shape[1:]:
            stride *= n
        inner = self.program.context(self.shape[1:], self.offset + first * stride)
        return inner[tuple(rest)] if rest else inner

    def unbind(self) -> list[Any]:
        return [self[i] for i in range(self.shape[0])]


class Program:
    """Statements in order, each distinct expression once."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.known: dict[str, Symbol] = {}
        self.n_context = 0

    def emit(self, op: str, *arguments: Symbol | float) -> Symbol:
        names = [a.name if isinstance(a, Symbol) else f"(T){float(a)!r}" for a in arguments]
        return self.bind(CODE[op].format(*names))

    def bind(self, expression: str) -> Symbol:
        if expression not in self.known:
            name = f"v{len(self.known)}"
            self.statements.append(f"const T {name} = {expression};")
            self.known[expression] = Symbol(self, name)
        return self.known[expression]

    def context(self, shape: tuple[int, ...], offset: int) -> Any:
        if shape:
            return SymbolArray(self, shape, offset)
        self.n_context = max(self.n_context, offset + 1)
        return Symbol(self, f"s{offset}")


def to_c(rule: Rule, n_row: int, n_col: int, context: Sequence[Tensor]) -> str:
    """C source of ``rule.step`` for these numbers of row and column features and these context shapes.

    ``void step(long R, long C, int threads, const T *context, T **data)``, with ``data`` the pointers of theta, theta0,
    rms, grad, the slots, the row features and the column features, in this order. Weights and slots change in place.
    """
    program, offset, symbols = Program(), 0, []
    for tensor in context:
        symbols.append(program.context(tuple(tensor.shape), offset))
        offset += tensor.numel()
    fields = ["theta", "theta0", "rms", "grad", *(f"slot{i}" for i in range(rule.n_slots))]
    values = [program.bind(f"{name}[i]") for name in fields]
    row = tuple(Symbol(program, f"r{k}") for k in range(n_row))
    col = tuple(program.bind(f"col{k}[c]") for k in range(n_col))
    make: Any = Coordinates
    w = make(*values[:4], row, col)
    step: Any = rule.step
    theta, slots = step(w, tuple(values[4:]), tuple(symbols), expand=True)
    stores = [f"theta[i] = {theta.name};", *(f"slot{i}[i] = {slot.name};" for i, slot in enumerate(slots))]
    arrays = [*fields, *(f"row{k}" for k in range(n_row)), *(f"col{k}" for k in range(n_col))]
    lines = [
        "void step(long R, long C, int threads, const T *context, T **data) {",
        *(f"  T *restrict {name} = data[{k}];" for k, name in enumerate(arrays)),
        *(f"  const T s{k} = context[{k}];" for k in range(program.n_context)),
        "  #pragma omp parallel for collapse(2) schedule(static) num_threads(threads)",
        "  for (long r = 0; r < R; r++)",
        f"  for (long start = 0; start < C; start += {BLOCK}) {{",
        f"    const long end = start + {BLOCK} < C ? start + {BLOCK} : C;",
        *(f"    const T r{k} = row{k}[r];" for k in range(n_row)),
        "    #pragma omp simd",
        "    for (long c = start; c < end; c++) {",
        "      const long i = r * C + c;",
        *(f"      {line}" for line in [*program.statements, *stores]),
        "    }",
        "  }",
        "}",
    ]
    return "\n".join(lines) + "\n"
