"""The door into C: every array of every kernel is checked before the call, in real calls of the whole package."""

import copy
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import dynlm
from dynlm.kernels import Array, Double, Kernel, Long
from dynlm.labs.general.gru import gru
from dynlm.meta.replay import Replay
from dynlm.models.recurrence import lstm_layer
from dynlm.optim.adjoint import FusedAdjoint
from dynlm.optim.base import Clock, Coordinates, Prior, Rule
from dynlm.optim.kernel import InPlaceUpdate, ReplayWork, Scale
from dynlm.types import InputError
from lab import needs_compiler
from support.optimizers import moved

pytestmark = needs_compiler

SHAPES = [(5, 4), (1, 6), (3, 3)]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def priors():
    return [Prior(f"t{i}", draw(*s, seed=i), draw(*s, seed=9 + i).abs() + 0.1, 0.8, 1.0) for i, s in enumerate(SHAPES)]


def fused_step(name, scales=None, dtype=torch.float32):
    def run():
        rule = moved(name)
        state, thetas = rule.init(priors()), [p.theta0.clone() for p in priors()]
        state.slots = [tuple(slot.to(dtype) for slot in of_one) for of_one in state.slots]
        state.clock.tick(3.0)
        InPlaceUpdate(rule)(thetas, [draw(*s, seed=20) for s in SHAPES], state, priors(), scales)

    return run


def adjoint():
    rule, prior = moved("gated"), priors()[0]
    state = rule.init([prior])
    state.clock = Clock(3, 2.0, 2.5)
    theta, grad = prior.theta0.clone().requires_grad_(), draw(5, 4, seed=1)
    seen, _ = rule.observe([theta.detach()], [grad], state, [prior])
    w = Coordinates(theta, prior.theta0, prior.rms, grad, seen.rows[0], seen.cols[0])
    context_nN, _ = rule.tensor_step(rule.shared([prior], seen.scalars, [3]), state.tensors)
    new, _ = FusedAdjoint(rule)(w, state.slots[0], context_nN[0])
    new.sum().backward()


def replay():
    rule = moved("diagonal")
    k, steps = 6, 3
    work = ReplayWork(
        *(draw(k, seed=i) for i in range(3)),
        tuple(draw(k, seed=3 + i) for i in range(rule.n_slots)),
        draw(steps + 1, k, seed=8),
        torch.ones(steps + 1),
        torch.zeros(2, k, dtype=torch.int32),
        (draw(steps + 1, 4), draw(steps + 1, 4)),
        (draw(steps + 1, 5),),
    )
    Replay(rule).fused(work, draw(steps, sum(np.prod(s, dtype=int) for s in rule.context_shapes)))


def lstm():
    x, h, c = draw(1, 4, 3), draw(1, 5), draw(1, 5)
    output, _ = lstm_layer(x, (h, c), *(w.requires_grad_() for w in (draw(20, 3), draw(20, 5), draw(20))))
    output.sum().backward()


def gru_both_ways():
    gru(draw(4, 2, 9).requires_grad_(), draw(9, 3).requires_grad_()).sum().backward()


DOORS = {
    "step": fused_step("adam"),
    "scaled": fused_step("rms", [Scale(0.5, 0.9), Scale(), Scale(2.0, 0.8)]),
    "half": fused_step("adam", dtype=torch.bfloat16),
    "look": fused_step("gated"),
    "means": fused_step("general"),
    "own-lstm": fused_step("lstm"),
    "own-gru": fused_step("gru"),
    "adjoint": adjoint,
    "replay": replay,
    "back": lstm,
    "gru": gru_both_ways,
}


def of_tensors(columns):
    """What each tensor has, from columns, and back."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def columns_of(each):
    return {name: [of_one[name] for of_one in each] for name in each[0]} if each else {}


def calls_of(run, monkeypatch):
    """(kernel, what it was given, what of each tensor) of every call into C."""
    calls, call = [], Kernel.__call__

    def record(self, given, each=None):
        calls.append((self, given, of_tensors(each or {})))
        call(self, given, each)

    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "__call__", record)
        run()
    assert calls
    return calls


def shorter(t):
    return t.reshape(-1)[:-1].clone() if t.dim() < 2 else t[:, :-1].contiguous()


def scattered(t):
    """The same values, every second place."""
    return torch.stack([t, t], -1)[..., 0]


FAULTS = {
    "float64": lambda t: t.float() if t.dtype == torch.float64 else t.double(),
    "integers": lambda t: t.to(torch.int64),
    "shorter": shorter,
    "longer": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
    "scattered": scattered,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "negated": torch._neg_view,
    "nothing": lambda t: None,
    "numpy": lambda t: np.zeros(t.shape),
}


NO_NUMBERS = {"nothing": None, "text": "3", "tensor": torch.tensor(3)}
"""what a size or a number cannot be"""


def tensors_of(given):
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}


def faulty(array, tensor):
    """Everything that an array can be instead, but what is the same to C."""
    for name, change in FAULTS.items():
        layout = name in ("scattered", "negated")
        if layout and (not array.out or tensor.numel() < 2 or tensor.dtype == torch.int32):
            continue
        yield name, change(tensor)


@pytest.mark.parametrize("door", DOORS)
def test_every_array_of_every_door_is_checked(door, monkeypatch):
    for kernel, given, each in calls_of(DOORS[door], monkeypatch):
        groups = [(given, ""), *((of_tensor, f" of tensor {k}") for k, of_tensor in enumerate(each))]
        before = {id(t): t.clone() for of_one, _ in groups for t in tensors_of(of_one).values()}
        declared = {a.name: a for a in (*kernel.once.arrays, *kernel.each.arrays)}
        for number, (of_one, where) in enumerate(groups):
            for name, value in of_one.items():
                faults = faulty(declared[name], value) if name in declared else NO_NUMBERS.items()
                for fault, wrong in faults:
                    first, *others = [{**g, name: wrong} if i == number else g for i, (g, _) in enumerate(groups)]
                    with pytest.raises(InputError, match=f"^kernel '{kernel.name}' takes ") as error:
                        kernel(first, columns_of(others))
                    assert "\n" not in str(error.value), fault
                    assert fault in ("float64", "integers") or f"takes {name}{where} as " in str(error.value)
        for of_one, _ in groups:
            assert all(torch.equal(t, before[id(t)]) for t in tensors_of(of_one).values())  # C never ran
        kernel(given, columns_of(each))  # as it was, it runs


LAYOUTS = {"scattered": scattered, "negated": lambda t: torch._neg_view(-t) if t.is_floating_point() else t}


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_only_read_may_lie_as_it_likes(door, lay, monkeypatch):
    for kernel, given, each in calls_of(DOORS[door], monkeypatch):
        changing, results = {a.name for a in (*kernel.once.arrays, *kernel.each.arrays) if a.out}, []
        for change in (torch.clone, lay):
            groups = []
            for of_one in (given, *each):
                laid = {n: t.clone() if n in changing else change(t) for n, t in tensors_of(of_one).items()}
                groups.append({**of_one, **laid})
            kernel(groups[0], columns_of(groups[1:]))
            results.append([g[name] for g in groups for name in g if name in changing])
        assert results[0]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["cell", "H"])
def test_an_argument_too_few_or_under_another_name_is_refused(name, monkeypatch):
    ((kernel, given, _),) = calls_of(DOORS["back"], monkeypatch)
    for wrong in ({k: v for k, v in given.items() if k != name}, {**given, "more": given[name]}):
        with pytest.raises(InputError, match=re.escape("takes ['steps', 'H', 'grad', ")):
            kernel(wrong)
    with pytest.raises(InputError, match=f"takes {name} as"):
        kernel({"other" if k == name else k: v for k, v in given.items()})
    with pytest.raises(InputError, match="float32 or float64, not float16"):
        kernel({**given, **{k: v.half() for k, v in tensors_of(given).items()}})


def test_sizes_follow_the_arrays(monkeypatch):
    ((kernel, given, _),) = calls_of(DOORS["back"], monkeypatch)
    for wrong in ({"steps": given["steps"] + 1}, {"H": given["H"] + 1}, {"steps": given["steps"] - 1}):
        with pytest.raises(InputError, match=r"takes \w+ as float32"):
            kernel({**given, **wrong})
    with pytest.raises(InputError, match="takes H as a whole number, and got float"):
        kernel({**given, "H": float(given["H"])})


def test_arrays_reach_c_by_name_and_sums_and_products_of_sizes_count():
    kernel = Kernel(
        "add",
        """for (long k = 0; k < n; k++) {
          EACH(k) for (long i = 0; i < m; i++) y[i] = factor * x[i] + *bias + m + shift;
        }""",
        (Double("factor"), Array("bias")),
        (Double("shift"), Long("m"), Array("x", "m"), Array("y", "m", out=True)),
    )
    for dtype in (torch.float32, torch.float64):
        xs = [torch.arange(3.0, dtype=dtype), torch.ones(2, dtype=dtype)]
        ys = [torch.zeros_like(x) for x in xs]
        each = {"y": ys, "m": [len(x) for x in xs], "x": xs, "shift": [0, 10]}
        kernel({"bias": torch.tensor(0.5, dtype=dtype), "factor": 2.0}, each)
        assert [y.tolist() for y in ys] == [[3.5, 5.5, 7.5], [14.5, 14.5]]
    shapes = Kernel("f", "", (Long("S"), Long("D"), Array("a", "S + 1, 3 * D"), Array("b", "2 * D + S")))
    shapes({"S": 2, "D": 4, "a": torch.zeros(3, 12), "b": torch.zeros(10)})
    with pytest.raises(InputError, match=re.escape("takes b as float32 [10]")):
        shapes({"D": 4, "S": 2, "a": torch.zeros(3, 12), "b": torch.zeros(9)})


@pytest.mark.parametrize("name", ["sgd", "rms", "adam", "general", "gated", "lstm"])
def test_a_gradient_with_its_sign_beside_its_memory_moves_weights_the_right_way(name):
    """``(z.conj() * 1j).real`` leaves such gradients; a tensor of one number of them is contiguous, too."""
    ends = []
    for grad in (torch.full((1,), 0.5), torch._neg_view(torch.full((1,), -0.5))):
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = dynlm.LearnedOptimizer([weight], rule=moved(name))
        weight.grad = grad
        optimizer.step()
        ends.append(weight.item())
    assert ends[0] == ends[1]


def test_slots_that_are_not_contiguous_are_updated_all_the_same():
    rule, results = moved("adam"), []
    for lay in (torch.clone, scattered):
        state, thetas = rule.init(priors()), [lay(p.theta0) for p in priors()]
        state.slots = [tuple(lay(slot) for slot in of_one) for of_one in state.slots]
        for _ in range(2):
            state.clock.tick(3.0)
            InPlaceUpdate(rule)(thetas, [draw(*s, seed=20) for s in SHAPES], state, priors())
        results.append([*thetas, *(slot for of_one in state.slots for slot in of_one)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a)
        assert a.abs().max() > 0


def test_kernels_and_steps_are_copied_and_pickled(monkeypatch):
    ((kernel, given, _),) = calls_of(DOORS["back"], monkeypatch)
    gates, results = given["gates"].clone(), []
    for other in (kernel, copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        again = {**given, "gates": gates.clone()}
        other(again)
        results.append(again["gates"])
    assert not torch.equal(results[0], gates)
    assert all(torch.equal(again, results[0]) for again in results)
    step, results = InPlaceUpdate(moved("gated")), []
    for apply in (step, copy.deepcopy(step)):
        state, thetas = step.rule.init(priors()), [p.theta0.clone() for p in priors()]
        state.clock.tick(3.0)
        apply(thetas, [draw(*s, seed=20) for s in SHAPES], state, priors())
        results.append(thetas)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["gated", "lstm"])
def test_a_kernel_is_printed_and_shapes_are_worked_out_once_and_not_at_every_segment(name, monkeypatch):
    printed, make, planned, plan = [], Kernel.__init__, [], Kernel._plan
    monkeypatch.setattr(Kernel, "__init__", lambda *args, **options: (printed.append(args), make(*args, **options))[1])
    monkeypatch.setattr(Kernel, "_plan", lambda *args: (planned.append(args), plan(*args))[1])
    rule = moved(name)
    step, state, thetas = InPlaceUpdate(rule), rule.init(priors()), [p.theta0.clone() for p in priors()]
    of_first = 0
    for _ in range(4):
        state.clock.tick(3.0)
        step(thetas, [draw(*s, seed=20) for s in SHAPES], state, priors())
        of_first = of_first or len(planned)
    assert len(printed) == 1
    assert of_first > 0
    assert len(planned) == of_first


@pytest.mark.parametrize("name", ["rms", "gated"])
def test_what_the_context_reads_of_the_priors_is_made_once_and_follows_them(name, monkeypatch):
    rule, asked, shared = moved(name), [], Rule.shared
    monkeypatch.setattr(Rule, "shared", lambda *args: (asked.append(args), shared(*args))[1])
    kept, grads = InPlaceUpdate(rule), [draw(*s, seed=20) for s in SHAPES]
    others = [p._replace(mean_rms=2.0, relative_rms=0.5) for p in priors()]
    for of_model, n_asked in ((priors(), 1), (others, 2), (priors(), 3)):
        ends = []
        for step in (kept, InPlaceUpdate(rule)):
            state, thetas = rule.init(of_model), [p.theta0.clone() for p in of_model]
            for _ in range(3):
                state.clock.tick(3.0)
                step(thetas, grads, state, [*of_model])
            ends.append(thetas)
            if step is kept:
                assert len(asked) == n_asked
        del asked[n_asked:]
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_there_is_no_other_door():
    root = Path(dynlm.__file__).parent
    users = {p.relative_to(root).as_posix() for p in root.rglob("*.py") if "import ctypes" in p.read_text()}
    assert users == {"kernels.py", "compiler.py", "compile_cache.py", "allocator.py"}
