"""Learned starts: each method's gradient against an independent form of it, and the outer loop that uses them."""

import copy

import pytest
import torch

from dynlm.data.segments import article_segments
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.meta.initialisation import METHODS, Task, conjugate_gradients, outer_gradient
from dynlm.optim.handmade import RMS, SGD, Adam
from dynlm.types import InputError
from few_shot_lab import DECAY, LR, flat, make_reader, make_task
from lab import START, make_article


def independent_maml(net, task, lr, decay):
    """Gradients of θ0 and the rate by torch.func alone."""
    theta0 = {name: p.detach() for name, p in net.named_parameters()}

    def loss(params, piece):
        return (torch.func.functional_call(net, params, piece[0]) - piece[1]).square().mean()

    def outer(start, rate):
        params, total = start, 0.0
        for piece, weight in zip(task.pieces, task.weights, strict=True):
            total = total + weight * loss(params, piece)
            slopes = torch.func.grad(loss)(params, piece)
            params = {k: p - rate * slopes[k] + decay * (start[k] - p) for k, p in params.items()}
        return total

    (grads, rate), value = torch.func.grad_and_value(outer, argnums=(0, 1))(
        theta0, torch.tensor(lr, dtype=torch.float64)
    )
    return value, flat(grads.values()), rate


@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0, 1.0), (0.3, 0.1, 0.4, 0.2)])
def test_maml_equals_an_independent_form_in_theta0_and_rate(weights):
    reader = make_reader()
    task = make_task(3)._replace(weights=weights)
    value, grads, rate = independent_maml(reader.model, task, LR, DECAY)
    found = outer_gradient("maml", reader, task, [reader.rule.lr])
    assert found.loss == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(flat(found.grads), grads, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(reader.rule.lr.grad, rate, rtol=1e-9, atol=1e-12)
    assert reader.rule.decay.grad is None, "only what is asked for is differentiated"


@pytest.mark.parametrize("method", ["maml", "joint"])
def test_gradient_matches_finite_differences(method):
    reader = make_reader()
    task = make_task(4)
    grads = flat(outer_gradient(method, reader, task).grads)
    direction = torch.randn(grads.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = direction.split([p.theta0.numel() for p in reader.priors])
    values = []
    for sign in (1, -1):
        moved = [
            prior._replace(theta0=prior.theta0 + sign * 1e-6 * part.view_as(prior.theta0))
            for prior, part in zip(reader.priors, parts, strict=True)
        ]
        there = InnerLoop(reader.model, reader.score, reader.rule, moved, reader.config)
        values.append(outer_gradient(method, there, task).loss)
    assert grads.dot(direction).item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("rule", [SGD(LR, DECAY), Adam(0.01, 1e-3, 0.1), RMS(0.05, 0.1, 0.1)], ids=lambda r: r.name)
def test_fomaml_equals_the_first_order_unroll(rule):
    reader = make_reader(rule)
    task = make_task(4)._replace(weights=(0.1, 0.2, 0.3, 0.4, 1.0))
    plain = outer_gradient("fomaml", reader, task)
    unrolled = outer_gradient("fomaml", reader, task, list(reader.rule.parameters()))
    assert plain.loss == pytest.approx(unrolled.loss, rel=1e-12)
    torch.testing.assert_close(flat(plain.grads), flat(unrolled.grads), rtol=1e-9, atol=1e-12)
    assert all(p.grad is not None for p in reader.rule.parameters())


def test_fomaml_rate_gradient_is_minus_the_products_of_gradients():
    reader = make_reader(SGD(LR))
    task = make_task(2)
    outer_gradient("fomaml", reader, task, [reader.rule.lr])
    with reader:
        reader.begin()
        slopes = [flat(reader.segment(*piece).grads) for piece in task.pieces]
    expected = -(slopes[2] @ (slopes[0] + slopes[1]))
    torch.testing.assert_close(reader.rule.lr.grad, expected, rtol=1e-9, atol=0)


def test_fomaml_without_inner_steps_is_joint_training_and_so_is_maml():
    reader = make_reader()
    task = make_task(0)
    joint = flat(outer_gradient("joint", reader, task).grads)
    for method in ("fomaml", "maml"):
        torch.testing.assert_close(flat(outer_gradient(method, reader, task).grads), joint, rtol=1e-12, atol=1e-14)


def test_joint_training_carries_the_hidden_state_through_pieces_that_do_not_count(lab):
    reader, task = article_reader(lab, SGD(0.1))
    only_last = [0.0] * (len(task.pieces) - 1) + [1.0]
    found = outer_gradient("joint", reader, task._replace(weights=only_last)).loss
    losses = reader.score(*map(torch.cat, zip(*task.pieces, strict=True)), None)[0]
    assert found == pytest.approx(losses[-len(task.pieces[-1][0]) :].mean().item(), rel=1e-9)


def test_reptile_with_one_step_of_sgd_is_joint_training():
    reader = make_reader(SGD(LR))
    piece = make_task().pieces[-1]
    reptile = outer_gradient("reptile", reader, Task([piece], [1.0]))
    joint = outer_gradient("joint", reader, Task([piece], [1.0]))
    assert reptile.loss == joint.loss
    torch.testing.assert_close(flat(reptile.grads), LR * flat(joint.grads), rtol=1e-9, atol=1e-14)


def test_reptile_is_the_distance_that_reading_went():
    reader, task = make_reader(), make_task(5)
    grads = outer_gradient("reptile", reader, task).grads
    with reader:
        reader.begin()
        for piece in task.pieces:
            reader.segment(*piece)
        moved = [p.theta0 - theta for p, theta in zip(reader.priors, reader.thetas, strict=True)]
    torch.testing.assert_close(grads, moved, rtol=0, atol=0)


class Linear(torch.nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, n))

    def forward(self, x_BN):
        return (x_BN @ self.weight)[:, None]


def test_imaml_on_a_quadratic_is_the_analytic_implicit_gradient():
    generator = torch.Generator().manual_seed(0)
    x, x2 = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    y, y2 = torch.randn(2, 9, 1, generator=generator, dtype=torch.float64)
    strength, lr = 0.7, 0.1
    reader = make_reader(SGD(lr, lr * strength), Linear(4))
    found = outer_gradient("imaml", reader, Task.few_shot((x, y), (x2, y2), 400), cg_steps=4)
    hessian, theta0 = 2 / 9 * x.T @ x, reader.priors[0].theta0[0]
    eye = torch.eye(4, dtype=torch.float64)
    solution = torch.linalg.solve(hessian + strength * eye, 2 / 9 * x.T @ y[:, 0] + strength * theta0)
    slope = 2 / 9 * x2.T @ (x2 @ solution - y2[:, 0])
    expected = torch.linalg.solve(eye + hessian / strength, slope)
    torch.testing.assert_close(found.grads[0][0], expected, rtol=1e-7, atol=1e-9)


def test_maml_through_a_long_proximal_loop_converges_to_imaml():
    strength, lr = 4.0, 0.05
    torch.manual_seed(0)
    smooth = torch.nn.Sequential(torch.nn.Linear(1, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
    reader = make_reader(SGD(lr, lr * strength), smooth)
    implicit = flat(outer_gradient("imaml", reader, make_task(300), cg_steps=30).grads)
    errors = []
    for steps in (2, 10, 100):
        unrolled = flat(outer_gradient("maml", reader, make_task(steps)).grads)
        errors.append(((unrolled - implicit).norm() / implicit.norm()).item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


def test_imaml_scores_the_solution_once_whatever_the_steps():
    calls = 0

    def counting(inputs, targets, hidden):
        nonlocal calls
        calls += 1
        return score(inputs, targets, hidden)

    reader = make_reader()
    score, reader.score = reader.score, counting
    for steps in (4, 9):
        calls = 0
        outer_gradient("imaml", reader, make_task(steps), cg_steps=7)
        assert calls == steps + 2


def test_conjugate_gradients_solve_and_stop_at_negative_curvature():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix, b = root @ root.T + torch.eye(6), torch.randn(6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(conjugate_gradients(matrix.mv, b, 6), torch.linalg.solve(matrix, b))
    assert torch.equal(conjugate_gradients(lambda v: -v, b, 6), b)
    assert torch.equal(conjugate_gradients(matrix.mv, torch.zeros(6), 6), torch.zeros(6))


def article_reader(lab, rule):
    model, score, priors = lab
    reader = InnerLoop(model, score, rule, priors, ReadConfig(kernel="eager"))
    pieces = list(article_segments(make_article(40, seed=3).ids_T, START, 8))
    return reader, Task(pieces, [1 / len(pieces)] * len(pieces))


@pytest.mark.parametrize("rule", [SGD(0.3, 0.01), RMS(0.03, 1e-3, 0.01), Adam(0.02, 1e-3, 0.01)], ids=lambda r: r.name)
def test_articles_of_a_tied_lstm_with_any_rule(lab, rule):
    reader, task = article_reader(lab, rule)
    before = copy.deepcopy(reader.model.state_dict())
    found = {method: flat(outer_gradient(method, reader, task).grads) for method in METHODS if method != "imaml"}
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in found.values())
    torch.testing.assert_close(found["fomaml"], flat(first_order_by_hand(reader, task)), rtol=1e-9, atol=1e-13)
    assert not torch.allclose(found["maml"], found["fomaml"], rtol=1e-3)
    after = reader.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def first_order_by_hand(reader, task):
    with reader:
        reader.begin()
        steps = [reader.segment(*piece) for piece in task.pieces]
    return [sum(w * s.grads[i] for w, s in zip(task.weights, steps, strict=True)) for i in range(len(reader.priors))]


def test_imaml_through_a_lstm_is_its_long_unroll(lab):
    model, carrying, priors = lab

    def score(inputs, targets, hidden):
        return carrying(inputs, targets, None)[0], None

    reader, _ = article_reader((model, score, priors), SGD(0.2, 0.2 * 3.0))
    support, query = list(article_segments(make_article(20, seed=3).ids_T, START, 10))
    unrolled = outer_gradient("maml", reader, Task.few_shot(support, query, 25))
    implicit = outer_gradient("imaml", reader, Task.few_shot(support, query, 40), cg_steps=15)
    torch.testing.assert_close(flat(implicit.grads), flat(unrolled.grads), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_theta0_is_back_after_an_exception(method):
    reader = make_reader()
    before = [p.detach().clone() for p in reader.model.parameters()]
    task = make_task(3)
    inputs, targets = task.pieces[-1]
    broken = Task([*task.pieces[:-1], (inputs, targets * float("nan"))], task.weights)
    with pytest.raises(InputError, match=r"loss is nan"):
        outer_gradient(method, reader, broken)
    assert all(torch.equal(a, b) for a, b in zip(before, reader.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("method", "rule", "phi", "part"),
    [
        ("mamal", None, False, "choose one of"),
        ("reptile", None, True, "phi_lr 0"),
        ("imaml", Adam(), False, "proximal|decay"),
        ("imaml", SGD(0.1), False, "positive decay"),
    ],
)
def test_what_cannot_be_is_one_line(method, rule, phi, part):
    reader = make_reader(rule)
    with pytest.raises(InputError, match=part) as error:
        outer_gradient(method, reader, make_task(), [reader.rule.lr] if phi else [])
    assert "\n" not in str(error.value)


def test_imaml_needs_a_support():
    with pytest.raises(InputError, match="weight 0"):
        outer_gradient("imaml", make_reader(), make_task(0))
