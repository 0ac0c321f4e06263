"""The kernel of one update in place of one tensor by a recurrent cell: the fused form of ``Recurrent.step``.

A thread takes a small block of weights through all layers while everything but their state stays in the first cache, so
nothing of the size of the tensor is allocated. The gates are a small matrix product, summed in vector registers over a
tile of weights. Its rows are scaled beforehand, so that each nonlinearity is a power of two and a quotient, and the
quotients of a state are merged into one.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from dynlm.kernels import Array, Kernel, Long

BLOCK = 16  # weights that pass through all layers together: a multiple of every tile
SIGMOID, TANH = -1 / math.log(2), -2 / math.log(2)  # σ(x) = 1 / (1 + e), tanh(x) = (1 − e) / (1 + e), e = 2^(factor x)
TERMS = {"float": 6, "double": 12}  # degree of the series of 2^x, |x| ≤ ½: its error is that of rounding
LIMIT = {"float": 40, "double": 300}  # of exponents: a gate is shut there, and a product of three is still finite


class Cell(NamedTuple):
    """One kind of layer as four blocks of H sums: which gate each takes from the weights, and what becomes of them."""

    n_gates: int
    states: tuple[str, ...]
    of_input: tuple[int, int, int, int]
    """gate of the input weights and the bias in each block; −1: none"""
    of_hidden: tuple[int, int, int, int]
    """gate of the hidden weights in each block; −1: none"""
    factors: tuple[float, float, float, float]
    first: str
    """C for unit u with its four sums p, q, r, s"""
    then: str
    """C for the same unit in a second loop: two short chains of dependent operations overlap better than a long one"""


LSTM = Cell(
    n_gates=4,
    states=("h", "c"),
    of_input=(0, 1, 2, 3),
    of_hidden=(0, 1, 2, 3),
    factors=(SIGMOID, SIGMOID, TANH, SIGMOID),
    first="""const T keep = 1 + EXP2(q[u]), g = EXP2(r[u]), ig = (1 + EXP2(p[u])) * (1 + g);
    c[u] = (c[u] * ig + (1 - g) * keep) / (keep * ig);
    s[u] = 1 + EXP2(s[u]);""",
    then=f"""const T e = EXP2((T){TANH!r} * c[u]);
    h[u] = (1 - e) / (s[u] * (1 + e));""",
)
GRU = Cell(
    n_gates=3,
    states=("h",),
    of_input=(0, 1, 2, -1),  # the reset gate multiplies only the hidden part of the candidate, so that stands apart
    of_hidden=(0, 1, -1, 2),
    factors=(SIGMOID, SIGMOID, TANH, TANH),
    first="r[u] += s[u] / (1 + EXP2(p[u]));",
    then="""const T z = EXP2(q[u]), e = EXP2(r[u]);
    h[u] = (h[u] * (1 + e) + z * (1 - e)) / ((1 + z) * (1 + e));""",
)


def recurrent_kernel(kind: Literal["lstm", "gru"], hidden: int, layers: int, n_row: int, n_col: int) -> Kernel:
    """Weights and slots of one tensor change in place.

    ``context`` is flat: input weight, hidden weight and bias of each layer, output weight, then lr, eps, decay, scale
    and the typical RMS.
    """
    cell = {"lstm": LSTM, "gru": GRU}[kind]
    powers = [_power("float", "unsigned", 127, 23), _power("double", "unsigned long long", 1023, 52)]
    n_inputs, n_slots = 3 + n_row + n_col, len(cell.states) * layers
    of_first = cell.n_gates * hidden * (1 + n_inputs + hidden)
    n_context = of_first + (layers - 1) * cell.n_gates * hidden * (1 + 2 * hidden) + hidden + 5
    return Kernel(
        "step",
        _step(cell, layers, n_row, n_col),
        (
            *map(Long, ("R", "C", "threads")),
            Array("context", str(n_context)),
            Array("theta", "R, C", out=True),
            *(Array(name, "R, C") for name in ("theta0", "rms", "grad")),
            *(Array(f"slot{k}", f"R, C, {hidden}", out=True) for k in range(n_slots)),
            *(Array(f"row{k}", "R, 1") for k in range(n_row)),
            *(Array(f"col{k}", "1, C") for k in range(n_col)),
        ),
        head="\n".join([_sizes(hidden), *powers, _pack(cell), _tile(), _layer(cell), CLIPPED]),
    )


def _sizes(hidden: int) -> str:
    """A tile is TILE weights × WIDE vectors, as many sums as the registers hold."""
    return f"""#if defined(__AVX512F__)
  #define BYTES 64
  #define TILE 4
#elif defined(__AVX__)
  #define BYTES 32
  #define TILE 2
#else
  #define BYTES 16
  #define TILE 2
#endif
typedef T V __attribute__((vector_size(BYTES), may_alias));
typedef T U __attribute__((vector_size(BYTES), may_alias, aligned(sizeof(T))));
enum {{
  H = {hidden}, BLOCK = {BLOCK}, LANES = BYTES / sizeof(T), VECTORS = (4 * H + LANES - 1) / LANES,
  CHUNKS = (VECTORS + 4) / 5, WIDE = (VECTORS + CHUNKS - 1) / CHUNKS, PADDED = CHUNKS * WIDE * LANES
}};
#define EXP2(x) _Generic((x), float: exp2_float, double: exp2_double)(x)
#define UNROLLED(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)
"""


def _power(real: str, bits: str, bias: int, mantissa: int) -> str:
    """2^x without a library call, which would keep loops from becoming vectors. A NaN stays one in the fraction f."""
    terms = [math.log(2) ** k / math.factorial(k) for k in range(TERMS[real] + 1)]
    series = f"({real}){terms[-1]!r}"
    for term in reversed(terms[:-1]):
        series = f"({series} * f + ({real}){term!r})"
    return f"""static inline {real} exp2_{real}({real} x) {{
  const {real} whole = {"rintf" if real == "float" else "rint"}(x), f = x - whole;
  int n = (int)whole;
  n = n < -{LIMIT[real]} ? -{LIMIT[real]} : n;
  n = n > {LIMIT[real]} ? {LIMIT[real]} : n;
  const union {{ {bits} bits; {real} value; }} scale = {{({bits})(n + {bias}) << {mantissa}}};
  return {series} * scale.value;
}}
"""


def _pack(cell: Cell) -> str:
    """The weights as tiles read them: for each chunk of sums the bias, then a row for each input and hidden unit."""
    of_input, of_hidden, factors = (", ".join(map(repr, t)) for t in (cell.of_input, cell.of_hidden, cell.factors))
    return f"""static void pack(const T *input, const T *hidden, const T *bias, long n_in, T *packed) {{
  static const int of_input[] = {{{of_input}}}, of_hidden[] = {{{of_hidden}}};
  static const double factor[] = {{{factors}}};
  for (long chunk = 0; chunk < CHUNKS; chunk++)
  for (long k = 0; k < 1 + n_in + H; k++)
  for (long j = 0; j < WIDE * LANES; j++, packed++) {{
    const long o = chunk * WIDE * LANES + j, block = o / H;
    const int gate = block > 3 ? -1 : (k <= n_in ? of_input : of_hidden)[block];
    *packed = 0;
    if (gate < 0) continue;
    const long row = gate * H + o % H;
    const T value = k == 0 ? bias[row] : k <= n_in ? input[row * n_in + k - 1] : hidden[row * H + k - 1 - n_in];
    *packed = (T)(factor[block] * value);
  }}
}}
"""


def _tile() -> str:
    return """static inline void tile(const V *weight, const T *const *x, long n_in, const T *const *h, T *sums) {
  V sum[TILE][WIDE];
  UNROLLED(v, WIDE) UNROLLED(j, TILE) sum[j][v] = weight[v];
  for (long k = 0; k < n_in; k++) {
    weight += WIDE;
    UNROLLED(v, WIDE) UNROLLED(j, TILE) sum[j][v] += weight[v] * x[j][k];
  }
  for (long k = 0; k < H; k++) {
    weight += WIDE;
    UNROLLED(v, WIDE) UNROLLED(j, TILE) sum[j][v] += weight[v] * h[j][k];
  }
  UNROLLED(v, WIDE) UNROLLED(j, TILE) *(V *)(sums + j * PADDED + v * LANES) = sum[j][v];
}
"""


def _layer(cell: Cell) -> str:
    """One layer of n weights. ``sums`` has a row a weight; ``gates`` has blocks that lie as the states do.

    Past the last weight a tile repeats it. Copies run over by less than a vector, into what is written next or slack.
    """
    states = ", ".join(f"T *restrict {name}" for name in cell.states)
    return f"""static void layer(const T *packed, const T *x, long n_in, long n, T *sums, T *gates, {states}) {{
  for (long w = 0; w < n; w += TILE) {{
    const T *xs[TILE], *hs[TILE];
    for (long j = 0; j < TILE; j++) {{
      const long at = w + j < n ? w + j : n - 1;
      xs[j] = x + at * n_in;
      hs[j] = h + at * H;
    }}
    for (long chunk = 0; chunk < CHUNKS; chunk++) {{
      const V *weight = (const V *)packed + chunk * (1 + n_in + H) * WIDE;
      tile(weight, xs, n_in, hs, sums + w * PADDED + chunk * WIDE * LANES);
    }}
  }}
  for (long block = 0; block < 4; block++)
    for (long w = 0; w < n; w++)
      for (long u = 0; u < H; u += LANES)
        *(U *)(gates + (block * BLOCK + w) * H + u) = *(const U *)(sums + w * PADDED + block * H + u);
  T *p = gates, *q = p + BLOCK * H, *r = q + BLOCK * H, *s = r + BLOCK * H;
  #pragma omp simd
  for (long u = 0; u < n * H; u++) {{
    {cell.first}
  }}
  #pragma omp simd
  for (long u = 0; u < n * H; u++) {{
    {cell.then}
  }}
}}
"""


CLIPPED = "static inline T clipped(T x) { return x > 1 ? 1 : x < -1 ? -1 : x; }\n"


def _features(n_row: int, n_col: int) -> str:
    """Return the first layer's inputs, the new weight as it is without the read-out, and the unit of the read-out."""
    rows = [f"in[{3 + k}] = row{k}[i / C];" for k in range(n_row)]
    columns = [f"in[{3 + n_row + k}] = col{k}[i % C];" for k in range(n_col)]
    return f"""for (long w = 0; w < n; w++) {{
        T *in = x + w * {3 + n_row + n_col};
        const long i = start + w;
        const T delta = theta[i] - theta0[i];
        const T floor = rms[i] + (T)0.1 * typical, inverse = 1 / (rms[i] + eps), normalised = grad[i] / floor;
        const T unit = scale * floor * inverse, pull = decay * rms[i];
        in[0] = clipped(LOG2(ABS(normalised) + tiny) * (T){math.log(2) / 5!r});
        in[1] = clipped(normalised * (T){math.exp(5)!r});
        in[2] = delta / (4 * unit + ABS(delta));
        {" ".join([*rows, *columns])}
        rest[w] = theta[i] - lr * grad[i] * inverse - (pull > 1 ? 1 : pull) * delta;
        units[w] = unit;
      }}"""


def _step(cell: Cell, layers: int, n_row: int, n_col: int) -> str:
    n_inputs, n_states = 3 + n_row + n_col, len(cell.states)
    packing, passing, read, packed, x = [], [], "context", "packed", "x"
    for k, n_in in enumerate([str(n_inputs), *["H"] * (layers - 1)]):
        gates, slot = f"{cell.n_gates} * H", n_states * k
        packing.append(f"pack({read}, {read} + {gates} * {n_in}, {read} + {gates} * ({n_in} + H), {n_in}, {packed});")
        states = ", ".join(f"slot{slot + s} + start * H" for s in range(n_states))
        passing.append(f"layer({packed}, {x}, {n_in}, n, sums, gates, {states});")
        read += f" + {gates} * (1 + {n_in} + H)"
        packed += f" + PADDED * (1 + {n_in} + H)"
        x = f"slot{slot} + start * H"  # the next layer reads this one's new output
    pack, layer = "\n  ".join(packing), "\n      ".join(passing)
    return f"""
  T *packed = aligned_alloc(BYTES, sizeof(T) * PADDED * ({1 + n_inputs} + H + {layers - 1} * (1 + 2 * H)));
  {pack}
  const T *output = {read}, *number = output + H;
  const T lr = number[0], eps = number[1], decay = number[2], scale = number[3], typical = number[4];
  const T tiny = sizeof(T) == 4 ? (T){2.0**-126!r} : (T){2.0**-1022!r};
  const long N = R * C;
  #pragma omp parallel num_threads(threads) if(N > BLOCK)
  {{
    T *sums = aligned_alloc(BYTES, sizeof(T) * (BLOCK * (PADDED + 4 * H) + 2 * LANES));
    T *gates = sums + BLOCK * PADDED + LANES, x[BLOCK * {n_inputs}], rest[BLOCK], units[BLOCK];
    #pragma omp for schedule(dynamic, 16)
    for (long start = 0; start < N; start += BLOCK) {{
      const long n = start + BLOCK < N ? BLOCK : N - start;
      {_features(n_row, n_col)}
      {layer}
      const T *h = {x};
      for (long w = 0; w < n; w++) {{
        T sum = 0;
        for (long u = 0; u < H; u++) sum += h[w * H + u] * output[u];
        theta[start + w] = rest[w] - units[w] * sum;
      }}
    }}
    free(sums);
  }}
  free(packed);"""
