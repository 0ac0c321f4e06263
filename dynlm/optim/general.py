"""A general-purpose learned optimizer: a gated Adam in each weight, and a network that sets the rate of each tensor.

A weight has two running means of its gradient, m and n, and one of its square, v. They move it along

    d = 2^o1 m/√v + o2 n/√v + o3 g/√v,        θ ← θ − η d,

where the gates o come from a few units that all weights share. η is a tensor's: a power of its columns, its first RMS
and time, as in µP (arXiv:2406.00153 for learned optimizers), shifted by a network that sees how much of the gradient is
noise, whether it agrees with its running mean, and how far the weights have come. Nothing depends on the scale of the
loss, and no prior is needed: it starts at Adam with a rate that falls with time, and is meta-trained on small tasks
(recipes/general.toml).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynlm.kernels import Array, Kernel, Long
from dynlm.optim.base import Coordinates, Prior, Rule, RuleState, Seen, Shared, Slots, columns_of
from dynlm.optim.features import affine, softsign
from dynlm.optim.learned import Weights, assemble, power
from dynlm.settings import Decay, Log2, Settings, Size

N_SAMPLED = 1024  # coordinates of a tensor that its statistics look at, at the least (all, if it has fewer)
N_SCALARS = 12
N_FEATURES, N_OUTPUTS = 4, 3
LEAST = 1e-30  # mean square of a gradient: below it is nothing
SMALLEST_RMS = 2.0**-7  # a tensor that starts at zero is taken for one of this size


@dataclass(frozen=True)
class GeneralConfig(Settings):
    """Sizes, and the Adam that it starts at."""

    hidden: Size = 4
    """units a weight"""
    tensor_hidden: Size = 16
    """units a tensor"""
    betas: tuple[Decay, Decay, Decay] = (0.9, 0.98, 0.99)
    """start of the decays of m, n and v; learned"""
    log2_lr: Log2 = -5.0
    """of a matrix with one column and RMS 1; its rate goes with columns^−¼ RMS^½ at the start"""
    log2_lr_vector: Log2 = -8.0


class General(Rule):
    """See the module's docstring. A few hundred meta-parameters, three state floats a weight."""

    name = "general"
    kind = "learned"
    n_slots = 3
    config_class = GeneralConfig

    def __init__(self, config: GeneralConfig | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config = config = config or GeneralConfig()
        normal, hidden, tensor_hidden = Weights(seed).normal, config.hidden, config.tensor_hidden
        self.logit_betas = nn.Parameter(torch.tensor([math.log(b / (1 - b)) for b in config.betas]))
        # log2 of the rate: of matrices, of vectors, by log2 of the first RMS and of columns, by time
        self.rate = nn.Parameter(torch.tensor([config.log2_lr, config.log2_lr_vector, 0.5, -0.25, -0.25]))
        self.log2_patience = nn.Parameter(torch.tensor(6.0))  # steps after which the rate begins to fall
        self.tensor_weight = normal(tensor_hidden, N_SCALARS, std=N_SCALARS**-0.5)
        self.tensor_output = nn.Parameter(torch.zeros(1 + N_OUTPUTS, tensor_hidden))
        self.tensor_to_hidden = normal(hidden, tensor_hidden, std=tensor_hidden**-0.5)
        self.input_weight = normal(hidden, N_FEATURES, std=N_FEATURES**-0.5)
        self.output_weight = nn.Parameter(torch.zeros(N_OUTPUTS, hidden))
        self.context_shapes = ((hidden, N_FEATURES), (N_OUTPUTS, hidden), (3,), (hidden,), (N_OUTPUTS,), (5,))

    @property
    def uses_prior(self) -> bool:
        return False

    @property
    def reference_lr(self) -> float:
        """AdamW's default: the rule takes the place of AdamW at that rate, with its schedules and its decay."""
        return 1e-3

    def observe(
        self, thetas: Sequence[Tensor], grads: Sequence[Tensor], state: RuleState, priors: Sequence[Prior]
    ) -> tuple[Seen, Any]:
        """Twelve numbers a tensor; the memory is each tensor's first RMS (n,)."""
        half = state.slots[0][0].dtype == torch.bfloat16
        look = _means if half or not _MEANS.serves(*thetas) else _means_in_c
        means_n6 = look(thetas, grads, state.slots)
        square, m_square, n_square, v, agreement, size = means_n6.unbind(1)
        first = size.sqrt() if state.memory is None else state.memory
        start = first.clamp(min=SMALLEST_RMS)

        def ratio(x: Tensor, y: Tensor, scale: float) -> Tensor:
            return (((x + LEAST) / (y + LEAST)).log2() / scale).clamp(-2.0, 2.0)

        shapes = size.new_tensor([(*theta.shape, theta.numel()) for theta in thetas])
        columns, vector, of_weights = shapes[:, 1].log2(), (shapes[:, 0] == 1).to(size), shapes[:, 2]
        signal = ratio(m_square, v, 8)
        together = (signal * of_weights).sum() / of_weights.sum()
        scalars = [
            signal,
            ratio(n_square, v, 8),
            agreement / (square * m_square + LEAST).sqrt(),
            ratio(square, v, 8),
            (size.sqrt().clamp(min=SMALLEST_RMS) / start).log2().div(4).clamp(-2.0, 2.0),
            together.expand_as(size),
            size.new_tensor(min(1.0, math.log2(state.clock.step) / 10)).expand_as(size),
            torch.ones_like(size),
            vector,
            start.log2(),
            columns,
            v.clamp(min=LEAST).sqrt(),
        ]
        rows = ((),) * len(thetas)
        return Seen(rows, rows, torch.stack(scalars, 1).to(thetas[0].dtype)), first

    def context(self, shared: Shared) -> Tensor:
        scalars = shared.scalars
        vector, log2_start, log2_columns, level = scalars[..., 8:].unbind(-1)
        seen = torch.cat([scalars[..., :9], log2_start[..., None] / 8, log2_columns[..., None] / 8], -1)
        seen = torch.cat([seen.clamp(-2.0, 2.0), (vector * log2_start / 8)[..., None]], -1)
        hidden = (seen @ self.tensor_weight.to(scalars).t()).tanh()
        out = hidden @ self.tensor_output.to(scalars).t()
        matrices, vectors, by_size, by_columns, by_time = self.rate.to(scalars)
        rate = torch.where(vector > 0, vectors, matrices + by_size * log2_start + by_columns * log2_columns)
        time = (1 + shared.step / self.log2_patience.exp2()).log2()
        log2_lr = rate + (by_time * time).to(scalars) + 4 * out[..., 0]
        betas = self.logit_betas.sigmoid()
        # running means start at zero: what they have forgotten of that, as in Adam
        filled = (1 / (1 - betas.double() ** shared.step[..., None])).to(scalars)
        filled = filled.expand(*scalars.shape[:-1], 3)
        numbers = [log2_lr.clamp(max=0.0).exp2()[..., None], filled, (1 / level)[..., None]]
        fixed = [self.input_weight, self.output_weight, betas]
        into = hidden @ self.tensor_to_hidden.to(scalars).t()
        return assemble(shared, fixed, into, out[..., 1:], torch.cat(numbers, -1))

    def step(self, w: Coordinates, slots: Slots, context: Slots) -> tuple[Tensor, Slots]:
        input_weight, output_weight, betas, bias, output_bias, numbers = context
        beta_m, beta_n, beta_v = betas.unbind()
        lr, filled_m, filled_n, filled_v, over_level = numbers.unbind()
        m = slots[0] + (1 - beta_m) * (w.grad - slots[0])
        n = slots[1] + (1 - beta_n) * (w.grad - slots[1])
        v = slots[2] + (1 - beta_v) * (w.grad * w.grad - slots[2])
        root = (filled_v * v).clamp(min=LEAST).sqrt()
        inverse = 1 / root
        fast = (filled_m * m * inverse).clamp(-4.0, 4.0)
        slow = (filled_n * n * inverse).clamp(-4.0, 4.0)
        now = (w.grad * inverse).clamp(-4.0, 4.0)
        features = [softsign(fast), softsign(slow), softsign(now), softsign(root * over_level)]
        hidden = [h.abs() for h in affine(features, input_weight, bias)]
        faster, of_slow, of_now = affine(hidden, output_weight, output_bias)
        direction = power(faster) * fast + of_slow * slow + of_now * now
        return w.theta - lr * direction, (m, n, v)

    def settings(self) -> dict[str, float]:
        return {"meta_parameters": float(sum(p.numel() for p in self.parameters()))}


def _stride(tensor: Tensor) -> int:
    return max(1, tensor.numel() // N_SAMPLED)


def _means(thetas: Sequence[Tensor], grads: Sequence[Tensor], slots: Sequence[Slots]) -> Tensor:
    """(n, 6): means of g², m², n², v, g m and θ² over evenly spaced coordinates, before the update. The plain form."""
    rows = []
    for theta, grad, (m, n, v) in zip(thetas, grads, slots, strict=True):
        t, g, m, n, v = (x.reshape(-1)[:: _stride(theta)].to(theta.dtype) for x in (theta, grad, m, n, v))
        rows.append(
            torch.stack([(g * g).mean(), (m * m).mean(), (n * n).mean(), v.mean(), (g * m).mean(), (t * t).mean()])
        )
    return torch.stack(rows)


_MEANS = Kernel(
    "means",
    """
  for (long k = 0; k < n; k++) {
    EACH(k)
    const long size = R * C;
    T g = 0, m = 0, n2 = 0, v = 0, gm = 0, t = 0;
    #define ADD \
      g += grad[i] * grad[i]; m += fast[i] * fast[i]; n2 += slow[i] * slow[i]; \
      v += square[i]; gm += grad[i] * fast[i]; t += theta[i] * theta[i];
    if (stride == 1) {
      #pragma omp simd reduction(+: g, m, n2, v, gm, t)
      for (long i = 0; i < size; i++) { ADD }
    } else
      for (long i = 0; i < size; i += stride) { ADD }
    const T sums[6] = {g, m, n2, v, gm, t};
    for (int j = 0; j < 6; j++) out[6 * k + j] = sums[j] / ((size + stride - 1) / stride);
  }""",
    [Array("out", "n, 6", out=True)],
    [*map(Long, ("R", "C", "stride")), *(Array(name, "R, C") for name in ("theta", "grad", "fast", "slow", "square"))],
)


def _means_in_c(thetas: Sequence[Tensor], grads: Sequence[Tensor], slots: Sequence[Slots]) -> Tensor:
    """Return the same in one call."""
    out = thetas[0].new_empty(len(thetas), 6)
    rows, columns = zip(*(theta.shape for theta in thetas), strict=True)
    fast, slow, square = columns_of(slots)
    arrays = {"theta": thetas, "grad": grads, "fast": fast, "slow": slow, "square": square}
    _MEANS({"out": out}, {"R": rows, "C": columns, "stride": [_stride(theta) for theta in thetas], **arrays})
    return out
