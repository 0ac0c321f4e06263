"""Kernels of a traced step: the update in place, its adjoint, and the reverse-mode replay of a window of updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, TypeVar

from dynlm.kernels import Array, Double, Kernel, Long
from dynlm.optim.trace import Node, Traced

COLUMNS = 1024  # coordinates of one row that a thread updates at a time
LANES = 256  # coordinates replayed at a time: their whole window stays in the second-level cache

FORWARD = {
    "neg": "-{0}",
    "abs": "ABS({0})",
    "sqrt": "SQRT({0})",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "atmost": "({0} > {1} ? {1} : {0})",  # written so that a NaN stays a NaN, as in torch
    "atleast": "({0} < {1} ? {1} : {0})",
}
# what ∂/∂value sends to ∂/∂argument: {a} is the adjoint, {v} the value, {0} and {1} the arguments
REVERSE: dict[str, tuple[str, ...]] = {
    "neg": ("-{a}",),
    "abs": ("({0} > 0 ? {a} : ({0} < 0 ? -{a} : 0))",),
    "sqrt": ("(T)0.5 * {a} / {v}",),
    "add": ("{a}", "{a}"),
    "sub": ("{a}", "-{a}"),
    "mul": ("{a} * {1}", "{a} * {0}"),
    "div": ("{a} / {1}", "-{a} * {v} / {1}"),
    "atmost": ("({0} <= {1} ? {a} : 0)", "({0} > {1} ? {a} : 0)"),
    "atleast": ("({0} >= {1} ? {a} : 0)", "({0} < {1} ? {a} : 0)"),
}
Leaf = Callable[[Node], str]
_X = TypeVar("_X")  # a tensor, or one of each of n
BF16 = """#include <stdint.h>
typedef uint16_t bf16;
static inline float widen(bf16 x) {
  union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
  return u.value;
}
static inline bf16 narrow(float x, uint32_t seed, uint32_t i) {  /* up or down at random: dynlm.optim.rounding */
  union { float value; uint32_t bits; } u = {x};
  uint32_t noise = i * 0x9E3779B9u + seed;
  noise = (noise ^ (noise >> 16)) * 0x85EBCA6Bu;
  noise = (noise ^ (noise >> 13)) & 0xFFFF;
  const uint32_t finite = (u.bits & 0x7F800000) != 0x7F800000, up = (u.bits + noise) >> 16;
  return finite ? up : (x != x ? 0x7FC0 : u.bits >> 16);
}
"""


def numbered(name: str, tensors: Sequence[_X]) -> dict[str, _X]:
    """Slots or features by the names that the kernels here give them."""
    return dict(zip(_names(name, len(tensors)), tensors, strict=True))


@cache
def _names(name: str, n: int) -> list[str]:
    return [f"{name}{k}" for k in range(n)]


def feature_arrays(traced: Traced, rows: str = "R, 1", columns: str = "1, C") -> list[Array]:
    """Return the row and column features."""
    arrays = [Array(f"row{k}", rows) for k in range(traced.n_row)]
    return arrays + [Array(f"col{k}", columns) for k in range(traced.n_col)]


def update_kernel(traced: Traced, state: Literal["T", "bf16"] = "T", scaled: bool = False) -> Kernel:
    """One update in place of n tensors; takes of θ0, static RMS and gradient what the step reads.

    Slots are of type ``state``: T, or bf16 for half the memory, rounded as ``age`` says.
    ``scaled``: θ ← keep θ + lr (step(θ) − θ) instead of step(θ), with a ``keep`` and an ``lr`` of each tensor.
    """
    slots = traced.slots
    places = {"field": "{0}[i]", "row": "r{0}", "col": "col{0}[c]", "context": "s{0}", "const": "(T){0}"}
    half = state == "bf16"

    def leaf(node: Node) -> str:
        text = places[node.op].format(node.name)
        return f"widen({text})" if half and node.op == "field" and node.name in slots else text

    read = {traced.program.nodes[number].name for number in _read(traced)}
    of_tensor, of_row, of_each = _forward_by_level(traced, leaf)
    theta, *rest = (f"v{n}" for n in traced.outputs)
    moved = f"(T)keep * theta[i] + (T)lr * ({theta} - theta[i])" if scaled else theta
    stores = [f"theta[i] = {moved};"]
    stores += [
        f"{slot}[i] = {f'narrow({v}, seed + {k} * 0xC2B2AE3Du, (uint32_t)i)' if half else v};"
        for k, (slot, v) in enumerate(zip(slots, rest, strict=True))
    ]
    seed = "const uint32_t seed = (uint32_t)(long)age * 0x9E3779B1u + (uint32_t)k * 0x85EBCA77u;" if half else ""
    body = f"""
  #pragma omp parallel num_threads(threads)
  for (long k = 0; k < n; k++) {{
    EACH(k)
    const T *shared = context + k * {traced.n_context};
    {seed}
{_lines(f"const T s{k} = shared[{k}];" for k in range(traced.n_context))}
{_lines(of_tensor)}
    #pragma omp for collapse(2) schedule(static) nowait
    for (long r = 0; r < R; r++)
    for (long start = 0; start < C; start += {COLUMNS}) {{
      const long end = start + {COLUMNS} < C ? start + {COLUMNS} : C;
{_lines(f"const T r{k} = row{k}[r];" for k in range(traced.n_row))}
{_lines(of_row)}
      #pragma omp simd
      for (long c = start; c < end; c++) {{
        const long i = r * C + c;
{_lines([*of_each, *stores])}
      }}
    }}
  }}"""
    return Kernel(
        "step",
        body,
        (Long("threads"), Double("age"), Array("context", f"n, {traced.n_context}")),
        (
            *map(Long, "RC"),
            *map(Double, ("lr", "keep") if scaled else ()),
            Array("theta", "R, C", out=True),
            *(Array(name, "R, C") for name in ("theta0", "rms", "grad") if name in read),
            *(Array(slot, "R, C", state, out=True) for slot in slots),
            *feature_arrays(traced),
        ),
        head=BF16 if half else "",
    )


def adjoint_kernel(traced: Traced) -> Kernel:
    """One step of one tensor backwards.

    ``d_theta`` and ``d_slot*`` hold the adjoints of the new weights and slots, and become those of the old ones; those
    of the gradient and of θ0 are written, and those of the context, a row a thread, are added to.
    """
    state = ["theta", *traced.slots]
    places = {"field": "{0}[i]", "row": "r{0}", "col": "col{0}[c]", "context": "s{0}", "const": "(T){0}"}
    forward = _forward(traced, lambda node: places[node.op].format(node.name))
    reverse, contributions = _reverse(traced, state, ("grad", "theta0"), "i")
    used = sorted(contributions)
    reduction = f" reduction(+: {', '.join(f'c{k}' for k in used)})" if used else ""
    body = f"""
{_lines(f"const T s{k} = context[{k}];" for k in range(traced.n_context))}
  #pragma omp parallel num_threads(threads)
  {{
    double *own = context_grad + (long)omp_get_thread_num() * {traced.n_context};
    #pragma omp for collapse(2) schedule(static)
    for (long r = 0; r < R; r++)
    for (long start = 0; start < C; start += {LANES}) {{
      const long end = start + {LANES} < C ? start + {LANES} : C;
{_lines(f"const T r{k} = row{k}[r];" for k in range(traced.n_row))}
{_lines(f"T c{k} = 0;" for k in used)}
      #pragma omp simd{reduction}
      for (long c = start; c < end; c++) {{
        const long i = r * C + c;
{_lines([*forward, *reverse])}
{_lines(f"c{k} += {contributions[k]};" for k in used)}
      }}
{_lines(f"own[{k}] += c{k};" for k in used)}
    }}
  }}"""
    return Kernel(
        "adjoint",
        body,
        (
            *map(Long, ("R", "C", "threads")),
            Array("context", str(traced.n_context)),
            Array("context_grad", f"threads, {traced.n_context}", "double", out=True),
            *(Array(name, "R, C") for name in ("theta", "theta0", "rms", "grad", *traced.slots)),
            *feature_arrays(traced),
            *(Array(f"d_{name}", "R, C", out=True) for name in (*state, "grad", "theta0")),
        ),
    )


def replay_kernel(traced: Traced) -> Kernel:
    """``steps`` updates of K coordinates of one tensor over recorded gradients, and back.

    The objective's derivative by the weights after t steps is weight[t] grad[t]. ``place`` holds the row and the column
    of each coordinate; the adjoints of the contexts, of each thread apart, are added to.
    """
    n, slots = traced.n_context, traced.slots
    state = ["theta", *slots]
    places = {
        "row": "row{0}[t * R + place[k]]",
        "col": "col{0}[t * C + place[K + k]]",
        "context": "context[t * N + {0}]",
        "const": "(T){0}",
    }

    def leaf(node: Node) -> str:
        if node.op != "field":
            return places[node.op].format(node.name)
        if node.name in state:
            return f"at_{node.name}[t * {LANES} + l]"
        return "grad[t * K + k]" if node.name == "grad" else f"{node.name}[k]"

    forward = _forward(traced, leaf)
    advance = [f"at_{s}[(t + 1) * {LANES} + l] = v{o};" for s, o in zip(state, traced.outputs, strict=True)]
    reverse, contributions = _reverse(traced, state, (), "l")
    used = sorted(contributions)
    reduction = f" reduction(+: {', '.join(f'c{k}' for k in used)})" if used else ""
    body = f"""
  #pragma omp parallel num_threads(threads)
  {{
    double *own = context_grad + (long)omp_get_thread_num() * steps * N;
{_lines(f"T *at_{s} = malloc(sizeof(T) * (steps + 1) * {LANES});" for s in state)}
{_lines(f"T d_{s}[{LANES}];" for s in state)}
    #pragma omp for schedule(static)
    for (long start = 0; start < K; start += {LANES}) {{
      const long n = start + {LANES} < K ? {LANES} : K - start;
      for (long l = 0; l < n; l++) {{
{_lines(f"at_{s}[l] = {s}[start + l]; d_{s}[l] = 0;" for s in state)}
      }}
      for (long t = 0; t < steps; t++) {{
        #pragma omp simd
        for (long l = 0; l < n; l++) {{
          const long k = start + l;
{_lines([*forward, *advance])}
        }}
      }}
      for (long t = steps - 1; t >= 0; t--) {{
{_lines(f"T c{k} = 0;" for k in used)}
        #pragma omp simd{reduction}
        for (long l = 0; l < n; l++) {{
          const long k = start + l;
{_lines(forward)}
          d_theta[l] += weight[t + 1] * grad[(t + 1) * K + k];
{_lines(reverse)}
{_lines(f"c{k} += {contributions[k]};" for k in used)}
        }}
{_lines(f"own[t * N + {k}] += c{k};" for k in used)}
      }}
    }}
{_lines(f"free(at_{s});" for s in state)}
  }}"""
    return Kernel(
        "replay",
        body,
        (
            *map(Long, ("K", "steps", "threads", "R", "C")),
            Array("context", f"steps, {n}"),
            Array("context_grad", f"threads, steps, {n}", "double", out=True),
            Array("place", "2, K", "int"),
            *(Array(name, "K") for name in ("theta", "theta0", "rms", *slots)),
            Array("grad", "steps + 1, K"),
            Array("weight", "steps + 1"),
            *feature_arrays(traced, "steps + 1, R", "steps + 1, C"),
        ),
        head=f"#define N {n}",
    )


def _lines(statements: object) -> str:
    return "\n".join(f"  {line}" for line in statements)  # type: ignore[attr-defined]


def _forward(traced: Traced, leaf: Leaf) -> list[str]:
    statements = []
    for number, node in enumerate(traced.program.nodes):
        template = FORWARD.get(node.op)
        value = leaf(node) if template is None else template.format(*(f"v{a}" for a in node.args))
        statements.append(f"const T v{number} = {value};")
    return statements


def _forward_by_level(traced: Traced, leaf: Leaf) -> tuple[list[str], list[str], list[str]]:
    """Return the statements that are the same for a tensor, for a row, and those of each coordinate."""
    levels: list[int] = []
    read = _read(traced)
    for node in traced.program.nodes:
        own = {"field": 2, "col": 2, "row": 1}.get(node.op, 0)
        levels.append(max([own, *(levels[a] for a in node.args)]))
    statements = [
        (level, text) for n, (level, text) in enumerate(zip(levels, _forward(traced, leaf), strict=True)) if n in read
    ]
    of_tensor, of_row, of_each = ([text for level, text in statements if level == k] for k in range(3))
    return of_tensor, of_row, of_each


def _read(traced: Traced) -> set[int]:
    """Return the values that others, or the results, are made of."""
    return {argument for node in traced.program.nodes for argument in node.args}.union(traced.outputs)


def _reverse(traced: Traced, state: list[str], extra: tuple[str, ...], index: str) -> tuple[list[str], dict[int, str]]:
    """Statements that turn d_state (after the update) into d_state (before it), and each context entry's adjoint.

    ``extra`` fields get their adjoints too; all are arrays indexed by ``index``.
    """
    nodes = traced.program.nodes
    moving = {*state, *extra}
    moves = [False] * len(nodes)  # does this value depend on θ, a slot, φ or an extra field?
    for number, node in enumerate(nodes):
        own = node.op == "context" or (node.op == "field" and node.name in moving)
        moves[number] = own or any(moves[a] for a in node.args)
    statements = [f"T a{number} = 0;" for number in range(len(nodes)) if moves[number]]
    for name, output in zip(state, traced.outputs, strict=True):
        if moves[output]:
            statements.append(f"a{output} += d_{name}[{index}];")
    for number in reversed(range(len(nodes))):
        node = nodes[number]
        if not moves[number] or node.op not in REVERSE:
            continue
        for argument, template in zip(node.args, REVERSE[node.op], strict=False):
            if moves[argument]:
                value = template.format(*(f"v{a}" for a in node.args), a=f"a{number}", v=f"v{number}")
                statements.append(f"a{argument} += {value};")
    leaves = {node.name: number for number, node in enumerate(nodes) if node.op == "field"}
    statements += [f"d_{name}[{index}] = a{leaves[name]};" for name in (*state, *extra)]
    contributions = {int(node.name): f"a{number}" for number, node in enumerate(nodes) if node.op == "context"}
    return statements, contributions
