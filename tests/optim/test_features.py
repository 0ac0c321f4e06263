"""What learned cells see: bounded, zero at the static level, the same in C as in torch."""

import pytest
import torch

from dynlm.optim.base import Clock, Prior, traits_of
from dynlm.optim.features import affine, look, softsign


def clock_at(*losses):
    clock = Clock()
    for loss in losses:
        clock.tick(float(loss))
    return clock


def prior(rows, columns, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    rms = torch.rand(rows, columns, generator=generator, dtype=dtype) + 0.1
    return Prior("w", torch.zeros_like(rms), rms, float(rms.mean()), 1.0)


def look_at(grad, prior, memory, clock):
    """(row features, column features, scalars) of one tensor, and its memory."""
    seen, memory = look([grad], [prior], memory, clock)
    return (*seen.rows[0], *seen.cols[0]), seen.scalars[0], memory


@pytest.mark.parametrize("shape", [(1, 50), (9, 5), (700, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_compiled_statistics_equal_the_plain_ones(shape, dtype, tolerance, monkeypatch):
    both, results = [prior(*shape, dtype), prior(4, 6, dtype)._replace(name="other")], {}
    for kernel in ("compiled", "eager"):
        monkeypatch.setenv("DYNLM_KERNEL", kernel)
        memory, generator = None, torch.Generator().manual_seed(1)
        for step in range(3):
            grads = [torch.randn(p.rms.shape, generator=generator, dtype=dtype) for p in both]
            grads[0][0] = 0.0
            seen, memory = look(grads, both, memory, clock_at(*range(3, 4 + step)))
        results[kernel] = [x for of_tensor in (*seen.rows, *seen.cols) for x in of_tensor] + [seen.scalars]
    for a, b in zip(*results.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_activity_is_zero_at_the_static_level_and_grows_with_the_gradient():
    p = prior(6, 4)
    (row, _, col), *_ = look_at(p.rms, p, None, clock_at(3))
    torch.testing.assert_close(row, torch.zeros(6, 1, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(col, torch.zeros(1, 4, dtype=torch.float64), atol=1e-9, rtol=0)
    (row, *_), scalars, _ = look_at(4 * p.rms, p, None, clock_at(3))
    torch.testing.assert_close(row, torch.full((6, 1), 0.5, dtype=torch.float64))  # 0.25 · log2 16 = 1
    assert scalars[0] == pytest.approx(0.5)


def test_row_memory_remembers_active_rows():
    p = prior(6, 4)
    grad = 1e-6 * p.rms
    grad[2] = 8 * p.rms[2]
    *_, memory = look_at(grad, p, None, clock_at(3))
    (_, row_memory, _), *_ = look_at(torch.zeros_like(grad), p, memory, clock_at(3, 3))
    assert row_memory.argmax() == 2


def test_surprise_and_time():
    p = prior(3, 2)

    def scalars_after(*losses):
        return look_at(p.rms, p, None, clock_at(*losses))[1]

    assert scalars_after(3, 3, 3)[1] == 0
    assert scalars_after(3, 3, 5)[1] == pytest.approx(2 / 3)
    assert scalars_after(float("nan"))[1] == 0, "an optimizer may be called without a loss"
    assert scalars_after(3)[2:].tolist() == [0, 1]
    assert scalars_after(*[3] * 16)[2] == pytest.approx(0.5)
    assert scalars_after(*[3] * 256)[2] == scalars_after(*[3] * 4000)[2] == 1.0  # a stream is older than any article


def test_softsign_and_affine(monkeypatch):
    assert softsign(torch.tensor([-1.0, 0.0, 3.0])).tolist() == [-0.5, 0.0, 0.75]
    features = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])]
    weight, bias = torch.tensor([[1.0, 10.0], [0.0, 1.0]]), torch.tensor([0.5, 0.0])
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        first, second = affine(features, weight, bias)
        assert first.tolist() == [[31.5, 32.5]]
        assert torch.broadcast_to(second, (1, 2)).tolist() == [[3.0, 3.0]]


def test_traits_tell_kinds_of_tensors_apart_in_any_units():
    def traits(shape, mean_rms=1e-3, relative_rms=1e3):
        return traits_of(Prior("", torch.empty(shape), torch.empty(shape), mean_rms, relative_rms))

    embedding, bias, matrix = traits((8192, 256)), traits((1, 1024)), traits((256, 8192))
    assert len({embedding, bias, matrix}) == 3
    assert (embedding[3], bias[3]) == (0.0, 1.0)
    assert embedding[:2] == matrix[1::-1]
    assert traits((4, 4), 1e-3, 1e3) == pytest.approx(traits((4, 4), 2.0, 0.5))  # a loss in other units
    assert traits((4, 4), 1e-3)[2] == pytest.approx(0.0)
    assert traits((4, 4), 1e-2)[2] > 0.0 > traits((4, 4), 0.0)[2] > -1.0
    assert all(abs(x) <= 2 for x in (*embedding, *bias, *traits((1, 1), 1e6)))
