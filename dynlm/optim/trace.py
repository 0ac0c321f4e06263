"""Tracing ``Rule.step``: called once with symbols in place of tensors, it leaves a program that can be printed as C.

The program holds each distinct expression once, so it fits in registers: dynlm.optim.source prints it as one loop over
coordinates, forwards and, for meta-gradients, backwards. Why not ``torch.compile``: on the gated rule it took 37 to 160
seconds to compile and its step took three times as long (docs/LOG.md).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from dynlm.optim.base import Coordinates, Rule


class Node(NamedTuple):
    """One value: an operation on earlier nodes (by number), or a leaf (``name`` says which; ``op`` is its kind)."""

    op: str
    args: tuple[int, ...] = ()
    name: str = ""


class Symbol:
    """A value of each coordinate, or a setting that all share. Supports what ``step`` may use, and nothing else."""

    def __init__(self, program: Program, number: int) -> None:
        self.program, self.number = program, number

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
        lower = self if min is None else self._apply("atleast", min)
        return lower if max is None else lower._apply("atmost", max)


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
    """Nodes in an order in which each can be computed. Leaves: ``field``, ``row``, ``col``, ``context``, ``const``."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._known: dict[Node, int] = {}

    def add(self, node: Node) -> Symbol:
        if node not in self._known:
            self._known[node] = len(self.nodes)
            self.nodes.append(node)
        return Symbol(self, self._known[node])

    def emit(self, op: str, *arguments: Symbol | float) -> Symbol:
        numbers = (
            (a if isinstance(a, Symbol) else self.add(Node("const", name=repr(float(a))))).number for a in arguments
        )
        return self.add(Node(op, tuple(numbers)))

    def context(self, shape: tuple[int, ...], offset: int) -> Any:
        return SymbolArray(self, shape, offset) if shape else self.add(Node("context", name=str(offset)))


class Traced(NamedTuple):
    """A rule's step as a program. ``outputs`` are the nodes of the new θ and the new slots."""

    program: Program
    outputs: tuple[int, ...]
    n_row: int
    n_col: int
    n_context: int

    @property
    def slots(self) -> list[str]:
        return [f"slot{i}" for i in range(len(self.outputs) - 1)]


def trace_step(rule: Rule, n_row: int, n_col: int) -> Traced:
    """Trace ``rule.step`` for these numbers of row and column features."""
    program = Program()
    symbols, offset = [], 0
    for shape in rule.context_shapes:
        symbols.append(program.context(shape, offset))
        offset += math.prod(shape)
    names = ["theta", "theta0", "rms", "grad", *(f"slot{i}" for i in range(rule.n_slots))]
    fields = [program.add(Node("field", name=name)) for name in names]
    row = tuple(program.add(Node("row", name=str(k))) for k in range(n_row))
    col = tuple(program.add(Node("col", name=str(k))) for k in range(n_col))
    coordinates: Any = Coordinates
    step: Any = rule.step
    theta, slots = step(coordinates(*fields[:4], row, col), tuple(fields[4:]), tuple(symbols))
    outputs = (theta.number, *(slot.number for slot in slots))
    return Traced(program, outputs, n_row, n_col, offset)
