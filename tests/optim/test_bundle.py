"""Many small tensors: what is kept from step to step is as good as laid out anew, and one call does for all of them."""

import copy

import pytest
import torch
from torch import nn

from dynlm import kernels
from dynlm.optim import LearnedOptimizer
from dynlm.optim.bundle import Bundle
from dynlm.optim.gradients import first_not_finite, running_rms
from lab import needs_compiler
from support.optimizers import for_rules, moved, run, same, trained

pytestmark = pytest.mark.usefixtures("eager")
KERNELS = pytest.mark.parametrize("kernel", ["eager", pytest.param("compiled", marks=needs_compiler)])


@pytest.fixture
def laid_out(monkeypatch):
    """How many tensors were laid out, each time that it was done."""
    sizes, make = [], Bundle.__init__
    monkeypatch.setattr(
        Bundle,
        "__init__",
        lambda self, rule, members, like: (sizes.append(len(members)), make(self, rule, members, like))[1],
    )
    return sizes


@for_rules
def test_kept_tensors_step_as_those_that_are_laid_out_anew(name, laid_out):
    (kept, parameters), (anew, others) = trained(name, 0), trained(name, 0)
    for step in range(4):
        anew._bundles = ([], [])
        run(kept, parameters, [step])
        run(anew, others, [step])
        same(parameters, others)
    assert laid_out == [4] * 5


CHANGES = {
    "weights that lie elsewhere": lambda o, p: setattr(p, "data", p.data.clone()),
    "weights of another dtype": lambda o, p: setattr(p, "data", p.data.float()),
    "weights that are scattered": lambda o, p: setattr(p, "data", p.data.t().contiguous().t()),
    "a slot that lies elsewhere": lambda o, p: setattr(o.state[p]["slot0"], "data", o.state[p]["slot0"] + 1.0),
    "another slot": lambda o, p: o.state[p].update(slot0=o.state[p]["slot0"] + 1.0),
    "a loaded state": lambda o, p: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "a new group": lambda o, p: o.add_param_group({"params": [nn.Parameter(torch.ones(3))]}),
    "a parameter that rests": None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["adam", "general"])
def test_whatever_changes_between_steps_is_noticed(name, change):
    """A deep copy lays everything out anew."""
    optimizer, parameters = trained(name, 3)
    optimizer.zero_grad()
    if change:
        change(optimizer, parameters[0])
    other = copy.deepcopy(optimizer)
    ends = []
    for one in (optimizer, other):
        its = [p for group in one.param_groups for p in group["params"]]
        for p in its if change else its[1:]:
            p.grad = torch.full_like(p, 0.1)
        one.step()
        ends.append(its)
        assert [one.state[p].get("step") for p in its] == [4 if change else 3, 4, 4, 4, 1][: len(its)]
    same(*ends)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_running_rms_of_all_tensors_is_that_of_each(kernel, dtype, monkeypatch):
    if kernel == "compiled":
        monkeypatch.delenv("DYNLM_KERNEL")
    shapes = [(3, 5), (1, 1), (2, 5000), (1, 7)]
    generator = torch.Generator().manual_seed(0)
    steps = [[torch.randn(s, generator=generator, dtype=dtype) for s in shapes] for _ in range(3)]
    rms = [torch.zeros(s, dtype=dtype) for s in shapes]
    for step, grads in enumerate(steps):
        means = running_rms(rms, grads, step)
    for k, r in enumerate(rms):
        weights = [0.001 * 0.999 ** (2 - step) for step in range(3)]
        square = sum(w * grads[k] ** 2 for w, grads in zip(weights, steps, strict=True)) / (1 - 0.999**3)
        torch.testing.assert_close(r, square.sqrt(), rtol=1e-5, atol=0)
        assert means[k] == pytest.approx(float(square.sqrt().mean()), rel=1e-5)


@KERNELS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_gradient_that_is_not_finite_is_found(kernel, bad, monkeypatch):
    if kernel == "compiled":
        monkeypatch.delenv("DYNLM_KERNEL")
    grads = [torch.full((rows, 4500), 1e38) for rows in (1, 2, 1, 3)]  # whose sum is not finite
    assert first_not_finite(grads) is None
    for where in (3, 1):
        grads[where][-1, -1] = bad
        assert first_not_finite(grads) == where


@needs_compiler
@pytest.mark.parametrize("name", ["adam", "rms", "gated", "general"])
def test_hundreds_of_tensors_of_all_dtypes_step_as_in_the_plain_form(name, monkeypatch):
    ends = []
    for kernel in ("eager", "auto"):
        monkeypatch.setenv("DYNLM_KERNEL", kernel)
        generator = torch.Generator().manual_seed(0)
        shapes = [(1 + k % 7,) if k % 2 else (1 + k % 5, 1 + k % 3) for k in range(200)]
        weights = [torch.randn(s, generator=generator) for s in shapes]
        parameters = [nn.Parameter(w.bfloat16() if k % 10 == 3 else w) for k, w in enumerate(weights)]
        optimizer = LearnedOptimizer(parameters, moved(name))
        for _ in range(3):
            for p in parameters:
                p.grad = (0.1 * torch.randn(p.shape, generator=generator)).to(p.dtype)
            optimizer.step()
        ends.append([p.detach().float() for p in parameters])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 2e-3, atol=1e-4)


def test_a_column_is_looked_at_once_for_each_dtype_and_shape(monkeypatch):
    looked, look = [], kernels._where
    monkeypatch.setattr(kernels, "_where", lambda *args: (looked.append(args), look(*args))[1])
    tensors, shapes = [torch.zeros(2, 3), torch.ones(2, 3)], [torch.Size((2, 3))] * 2
    column = kernels.Column(tensors)
    for _ in range(2):
        assert list(column.where(torch.float32, shapes)) == [t.data_ptr() for t in tensors]
    assert len(looked) == 1
    for dtype, other in ((torch.float64, shapes), (torch.float32, [torch.Size((3, 2))] * 2)):
        assert not list(column.where(dtype, other))
