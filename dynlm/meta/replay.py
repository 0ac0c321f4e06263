"""The replay engine: exact first-order meta-gradients without a language-model pass or a double backward.

With recorded gradients g_t held fixed, coordinates are independent, and the meta-gradient is that of the surrogate

    J(φ) = Σ_t w_t ⟨g_t, θ_t(φ)⟩.

So the rule alone is run again over the recorded g_t and backpropagated through, block of coordinates by block, in a
fused kernel (dynlm.optim.kernel) or in torch. What the coordinates of a tensor share, the contexts and the networks
that make them, is run once and receives the summed gradient of all blocks. Since J is a sum over coordinates, a random
sample of them (dynlm.meta.sampling) gives an unbiased estimate: O(T·K) floats are stored, K ≪ N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynlm.allocator import MIB
from dynlm.meta.recording import Recording
from dynlm.meta.sampling import Stratum
from dynlm.optim.base import Coordinates, Rule
from dynlm.optim.kernel import FusedReplay, ReplayWork
from dynlm.settings import Settings, Whole


@dataclass(frozen=True)
class ReplayConfig(Settings):
    """How a recording is replayed."""

    memory: Whole = 256
    """MiB that a block of coordinates may take beside the recording; blocks are sized from it"""
    fused: bool = True
    """one C loop where the rule and the machine allow it; False: torch's autograd, the plain form"""


class Replay:
    """Adds ∇φ J of recordings to the gradients of one rule's meta-parameters."""

    def __init__(self, rule: Rule, config: ReplayConfig | None = None) -> None:
        self.rule, self.config = rule, config or ReplayConfig()
        self.fused = FusedReplay(rule)

    def __call__(self, recording: Recording, part: int = 0, parts: int = 1) -> None:
        """``part`` of ``parts``: only every so many-th coordinate, weighted to stand for all."""
        if len(recording) < 2:
            return  # no update moves a loss of this window
        context_WnN = self._contexts(recording)
        if not context_WnN.requires_grad:
            return  # a rule without meta-parameters
        adjoint_WnN = torch.zeros(context_WnN.shape, dtype=torch.float64, device=context_WnN.device)
        for tensor, stratum in enumerate(recording.strata):
            chosen = range(part, stratum.index_K.numel(), parts)
            if chosen:
                adjoint_WnN[:, tensor] = self._adjoint(recording, tensor, chosen, context_WnN[:, tensor].detach())
        context_WnN.backward(adjoint_WnN.to(context_WnN))

    def _contexts(self, recording: Recording) -> Tensor:
        """The contexts (W − 1, n, N) of all updates but the last, which moves no loss of this window; a graph in φ."""
        n, rule = len(recording) - 1, self.rule
        scalars_WnS, like = recording.scalars[:n], recording.theta[0]
        if not rule.tensor_width:
            return rule.context(rule.shared(recording.priors, scalars_WnS, recording.steps[:n])).to(like)
        memory, contexts = recording.tensors, []
        for scalars, step in zip(scalars_WnS, recording.steps[:n], strict=True):
            context, memory = rule.tensor_step(rule.shared(recording.priors, scalars, [step]), memory)
            contexts.append(context.to(like))
        return torch.stack(contexts)

    def _adjoint(self, recording: Recording, tensor: int, chosen: range, context_WN: Tensor) -> Tensor:
        """∂J/∂context (W − 1, N) from the chosen coordinates of one tensor, summed over blocks."""
        features = len(recording.rows[tensor]), len(recording.cols[tensor])
        fused = self.config.fused and self.fused.serves(recording.theta[tensor], *features)
        replay_block = self.fused if fused else self._plain_block
        stratum = recording.strata[tensor]
        weight = stratum.weight * stratum.index_K.numel() / len(chosen)
        total = torch.zeros_like(context_WN, dtype=torch.float64)
        size = chosen.step * self._block(recording, tensor, context_WN, fused)
        for start in range(chosen.start, chosen.stop, size):
            block = slice(start, min(start + size, chosen.stop), chosen.step)
            total += replay_block(block_work(recording, tensor, block, weight), context_WN)
        return total

    def _block(self, recording: Recording, tensor: int, context_WN: Tensor, fused: bool) -> int:
        """Coordinates of a block that fits the budget: a fused one holds its gradients, a plain one its graph."""
        like = recording.theta[tensor]
        per_step = like.element_size()
        if not fused:
            work = block_work(recording, tensor, slice(0, 16), 1.0)
            per_step += -(-self._graph_bytes(work, context_WN) // work.theta.shape[0])
        return max(64, self.config.memory * MIB // (per_step * len(recording)))

    def _graph_bytes(self, work: ReplayWork, context_WN: Tensor) -> int:
        """Return what autograd keeps of one step over a small block, measured."""
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            if tensor.shape and work.theta.shape[0] in tensor.shape:
                kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self._steps(work, context_WN, 1)
        return sum(kept.values())

    def _steps(self, work: ReplayWork, context_WN: Tensor, steps: int) -> tuple[list[Tensor], Tensor]:
        """Return (θ after each of the first updates, the leaf that stands for their contexts)."""
        leaf_WN = context_WN[:steps].clone().requires_grad_()
        theta, slots, thetas = work.theta, work.slots, []
        row_K, col_K = work.place_2K.long()
        for t in range(steps):
            row, col = tuple(x[t, row_K] for x in work.row), tuple(x[t, col_K] for x in work.col)
            w = Coordinates(theta, work.theta0, work.rms, work.grads_WK[t], row, col)
            theta, slots = self.rule.flat_step(w, slots, leaf_WN[t])
            thetas.append(theta)
        return thetas, leaf_WN

    def _plain_block(self, work: ReplayWork, context_WN: Tensor) -> Tensor:
        """Autograd through ``Rule.step``: the reference, and the way of rules that are not traceable."""
        thetas, leaf_WN = self._steps(work, context_WN, work.grads_WK.shape[0] - 1)
        cotangents = (work.weights_W[1:, None] * work.grads_WK[1:]).unbind()
        (adjoint_WN,) = torch.autograd.grad(thetas, leaf_WN, cotangents)
        return adjoint_WN.double()


def block_work(recording: Recording, tensor: int, block: slice, weight: float) -> ReplayWork:
    """Return the chosen coordinates of one tensor's stratum, ready to replay."""
    prior, stratum = recording.priors[tensor], recording.strata[tensor]
    index_K, columns = stratum.index_K[block], prior.theta0.shape[1]
    grads_WK = recording.grads.read(tensor, len(recording), block)
    of_block = Stratum(index_K, weight)
    return ReplayWork(
        recording.theta[tensor][block],
        of_block.take(prior.theta0),
        of_block.take(prior.rms),
        tuple(slot[block] for slot in recording.slots[tensor]),
        grads_WK,
        grads_WK.new_tensor(recording.weights) * weight,
        torch.stack([index_K // columns, index_K % columns]).int(),
        tuple(x[: len(recording)] for x in recording.rows[tensor]),
        tuple(x[: len(recording)] for x in recording.cols[tensor]),
    )


def sampling_error(replay: Replay, recording: Recording, parts: int = 8) -> tuple[Tensor, Tensor]:
    """Return (estimate, standard error) of the sampled meta-gradient, flat over φ, from ``parts`` disjoint subsamples.

    Subsamples are interleaved, so the error says nothing of what even spacing gains: it is an upper estimate. Gradients
    that φ already holds are left as they are.
    """
    phi = [p for p in replay.rule.parameters() if p.numel()]
    before = [p.grad for p in phi]
    draws = []
    for part in range(parts):
        for p in phi:
            p.grad = None
        replay(recording, part, parts)
        draws.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).double().flatten() for p in phi]))
    for p, grad in zip(phi, before, strict=True):
        p.grad = grad
    stacked = torch.stack(draws)
    return stacked.mean(0), stacked.std(0) / parts**0.5
