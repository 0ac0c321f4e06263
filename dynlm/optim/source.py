"""C source of a traced step: the update in place, its adjoint, and the reverse-mode replay of a window of updates."""

from __future__ import annotations

from collections.abc import Callable

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
BF16 = """#include <stdint.h>
typedef uint16_t bf16;
static inline float widen(bf16 x) {
  union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
  return u.value;
}
static inline bf16 narrow(float x) {  /* to nearest, ties to even; a NaN stays one */
  union { float value; uint32_t bits; } u = {x};
  return x != x ? 0x7fc0 : (u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16;
}
"""


def update_source(traced: Traced, state: str = "T", scaled: bool = False) -> str:
    """``void step(long n, const long *dims, int threads, const T *context, double lr, double keep, void **data)``.

    Changes weights and slots of n tensors in place. ``dims``: R, C of each; ``context`` (n, N). ``data`` points, for
    each, to theta, theta0, rms, grad, the slots (all R × C), the row features (R) and column features (C). Slots are of
    type ``state``: T, or bf16 for half the memory. ``scaled``: θ ← keep θ + lr (step(θ) − θ) instead of step(θ).
    """
    slots = traced.slots
    arrays = ["theta", "theta0", "rms", "grad", *slots]
    arrays += [f"row{k}" for k in range(traced.n_row)] + [f"col{k}" for k in range(traced.n_col)]
    places = {"field": "{0}[i]", "row": "r{0}", "col": "col{0}[c]", "context": "s{0}", "const": "(T){0}"}
    half = state == "bf16"

    def leaf(node: Node) -> str:
        text = places[node.op].format(node.name)
        return f"widen({text})" if half and node.op == "field" and node.name in slots else text

    of_tensor, of_row, body = _forward_by_level(traced, leaf)
    theta, *rest = (f"v{n}" for n in traced.outputs)
    moved = f"(T)keep * theta[i] + (T)lr * ({theta} - theta[i])" if scaled else theta
    stores = [f"theta[i] = {moved};"]
    stores += [f"{slot}[i] = {f'narrow({v})' if half else v};" for slot, v in zip(slots, rest, strict=True)]
    kinds = {name: state if name in slots else "T" for name in arrays}
    return f"""{BF16 if half else ""}
void step(long n, const long *dims, int threads, const T *context, double lr, double keep, void **data) {{
  #pragma omp parallel num_threads(threads)
  for (long k = 0; k < n; k++) {{
    const long R = dims[2 * k], C = dims[2 * k + 1];
    const T *numbers = context + k * {traced.n_context};
{_lines(f"{kind} *restrict {name} = data[k * {len(arrays)} + {a}];" for a, (name, kind) in enumerate(kinds.items()))}
{_lines(f"const T s{k} = numbers[{k}];" for k in range(traced.n_context))}
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
{_lines([*body, *stores])}
      }}
    }}
  }}
}}
"""


def adjoint_source(traced: Traced) -> str:
    """``void adjoint(long R, long C, int threads, context, double *context_grad, T **data)``: one step backwards.

    ``data`` points to theta, theta0, rms, grad, the slots, row features (R) and column features (C) before the update,
    then to the adjoints of the new theta and slots, which become those of the old ones, and to those of grad and
    theta0, which are written; ``context_grad`` (threads, n) is added to.
    """
    state = ["theta", *traced.slots]
    arrays = ["theta", "theta0", "rms", "grad", *traced.slots]
    arrays += [f"row{k}" for k in range(traced.n_row)] + [f"col{k}" for k in range(traced.n_col)]
    adjoints = [f"d_{name}" for name in (*state, "grad", "theta0")]
    places = {"field": "{0}[i]", "row": "r{0}", "col": "col{0}[c]", "context": "s{0}", "const": "(T){0}"}
    forward = _forward(traced, lambda node: places[node.op].format(node.name))
    reverse, contributions = _reverse(traced, state, ("grad", "theta0"), "i")
    used = sorted(contributions)
    reduction = f" reduction(+: {', '.join(f'c{k}' for k in used)})" if used else ""
    return f"""void adjoint(long R, long C, int threads, const T *context, double *context_grad, T **data) {{
{_lines(f"T *restrict {name} = data[{k}];" for k, name in enumerate([*arrays, *adjoints]))}
{_lines(f"const T s{k} = context[{k}];" for k in range(traced.n_context))}
  #pragma omp parallel num_threads(threads)
  {{
    double *own = context_grad + (long)omp_get_thread_num() * {max(traced.n_context, 1)};
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
  }}
}}
"""


def replay_source(traced: Traced) -> str:
    """``void replay(long K, long W, int threads, sizes, context, context_grad, place, data)``: W − 1 updates and back.

    ``data`` points to theta, theta0, rms (K), grad (W, K), weight (W), the slots (K), row features (W, R), column
    features (W, C); ∂J/∂θ_t is weight[t] grad[t]. ``place``: row and column of each coordinate (2, K); ``sizes``: R, C
    and the row length of grad; ``context`` (W − 1, n); ``context_grad`` (threads, W − 1, n), which is added to.
    """
    n, slots = traced.n_context, traced.slots
    arrays = ["theta", "theta0", "rms", "grad", "weight", *slots]
    arrays += [f"row{k}" for k in range(traced.n_row)] + [f"col{k}" for k in range(traced.n_col)]
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
        return "grad[t * stride + k]" if node.name == "grad" else f"{node.name}[k]"

    forward = _forward(traced, leaf)
    advance = [f"at_{s}[(t + 1) * {LANES} + l] = v{o};" for s, o in zip(state, traced.outputs, strict=True)]
    reverse, contributions = _reverse(traced, state, (), "l")
    used = sorted(contributions)
    reduction = f" reduction(+: {', '.join(f'c{k}' for k in used)})" if used else ""
    return f"""#define N {max(n, 1)}
void replay(long K, long W, int threads, const long *sizes, const T *context, double *context_grad, const int *place,
            T **data) {{
  const long R = sizes[0], C = sizes[1], stride = sizes[2];
{_lines(f"const T *restrict {name} = data[{k}];" for k, name in enumerate(arrays))}
  #pragma omp parallel num_threads(threads)
  {{
    double *own = context_grad + (long)omp_get_thread_num() * (W - 1) * N;
{_lines(f"T *at_{s} = malloc(sizeof(T) * W * {LANES});" for s in state)}
{_lines(f"T d_{s}[{LANES}];" for s in state)}
    #pragma omp for schedule(static)
    for (long start = 0; start < K; start += {LANES}) {{
      const long n = start + {LANES} < K ? {LANES} : K - start;
      for (long l = 0; l < n; l++) {{
{_lines(f"at_{s}[l] = {s}[start + l]; d_{s}[l] = 0;" for s in state)}
      }}
      for (long t = 0; t < W - 1; t++) {{
        #pragma omp simd
        for (long l = 0; l < n; l++) {{
          const long k = start + l;
{_lines([*forward, *advance])}
        }}
      }}
      for (long t = W - 2; t >= 0; t--) {{
{_lines(f"T c{k} = 0;" for k in used)}
        #pragma omp simd{reduction}
        for (long l = 0; l < n; l++) {{
          const long k = start + l;
{_lines(forward)}
          d_theta[l] += weight[t + 1] * grad[(t + 1) * stride + k];
{_lines(reverse)}
{_lines(f"c{k} += {contributions[k]};" for k in used)}
        }}
{_lines(f"own[t * N + {k}] += c{k};" for k in used)}
      }}
    }}
{_lines(f"free(at_{s});" for s in state)}
  }}
}}
"""


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
    """The statements that are the same for a tensor, for a row, and those of each coordinate."""
    levels: list[int] = []
    for node in traced.program.nodes:
        own = {"field": 2, "col": 2, "row": 1}.get(node.op, 0)
        levels.append(max([own, *(levels[a] for a in node.args)]))
    statements = list(zip(levels, _forward(traced, leaf), strict=True))
    of_tensor, of_row, of_each = ([text for level, text in statements if level == k] for k in range(3))
    return of_tensor, of_row, of_each


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
