"""What calls C, under ``torch.compile`` and ``torch.func``: gradients equal to eager ones, or one clear error."""

import copy

import pytest
import torch
import torch.nn.functional as F

from dynlm.labs.general.gru import gru
from dynlm.labs.general.nets import GRULanguageModel
from dynlm.models.core import LSTMScorer, ReadingLSTM
from dynlm.models.lstm import ModelConfig
from dynlm.models.recurrence import differentiable_twice, lstm_layer
from dynlm.types import InputError

VOCAB = 30
KERNELS = pytest.mark.parametrize("kernel", ["auto", "eager"])
# torch's compiler warns of its own deprecated calls
QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def language_model(layers=2, hidden=11):
    model = ModelConfig(embedding_size=9, hidden_size=hidden, layers=layers).build(VOCAB, 0, seed=1)
    return model.eval()


def ids(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(3))


def gradients(call, module):
    module.zero_grad()
    call().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def assert_same(ours, eager):
    assert ours.keys() == eager.keys()
    for name, grad in eager.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@QUIET
@KERNELS
@pytest.mark.parametrize(("batch", "training"), [(1, False), (1, True), (3, False)])
def test_the_language_models_gradients_are_the_eager_ones(kernel, batch, training, monkeypatch):
    """Under torch.compile they were wrong without an error: the embedding missed what its read-out sends."""
    monkeypatch.setenv("DYNLM_KERNEL", kernel)
    model, x = language_model().train(training), ids(batch, 6)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(gradients(lambda: compiled(x, labels=x).loss, model), gradients(lambda: model(x, labels=x).loss, model))


@pytest.mark.slow
@QUIET
def test_inductor_gives_the_same_gradients():
    model, x = language_model(), ids(1, 6)
    compiled = torch.compile(model)
    assert_same(gradients(lambda: compiled(x, labels=x).loss, model), gradients(lambda: model(x, labels=x).loss, model))


@QUIET
@KERNELS
def test_the_reading_models_gradients_are_the_eager_ones(kernel, monkeypatch):
    monkeypatch.setenv("DYNLM_KERNEL", kernel)
    whole, x = language_model(), ids(7)
    light = ReadingLSTM(whole.config.to_dict())
    light.load_state_dict(whole.state_dict())
    compiled = LSTMScorer(torch.compile(light, backend="aot_eager"))
    eager = gradients(lambda: LSTMScorer(light)(x[:-1], x[1:], None)[0].mean(), light)
    assert_same(gradients(lambda: compiled(x[:-1], x[1:], None)[0].mean(), light), eager)


@QUIET
@KERNELS
def test_the_gru_models_gradients_are_the_eager_ones(kernel, monkeypatch):
    monkeypatch.setenv("DYNLM_KERNEL", kernel)
    torch.manual_seed(0)
    model, x = GRULanguageModel(VOCAB, 8), ids(3, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def loss(call):
        return F.cross_entropy(call(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    assert_same(gradients(lambda: loss(compiled), model), gradients(lambda: loss(model), model))


def layer(n_steps=5, n_inputs=3, width=4, batch=1):
    weights = [draw(4 * width, n_inputs, seed=1), draw(4 * width, width, seed=2), draw(4 * width, seed=3)]
    return draw(batch, n_steps, n_inputs), (draw(batch, width, seed=4), draw(batch, width, seed=5)), weights


def layer_loss(x, state, *weights):
    output, (h, c) = lstm_layer(x, state, *weights)
    return output.square().sum() + 0.0 * h.sum().detach() + 0.0 * c.sum().detach()


@QUIET
def test_a_layer_is_one_operation_of_any_length():
    """No graph break, and no graph that grows with the text."""
    x, state, weights = layer(40)
    weights = [w.requires_grad_() for w in weights]
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph

    compiled = torch.compile(layer_loss, backend=backend, fullgraph=True)
    ours = torch.autograd.grad(compiled(x, state, *weights), weights)
    for a, b in zip(ours, torch.autograd.grad(layer_loss(x, state, *weights), weights), strict=True):
        torch.testing.assert_close(a, b)
    assert sizes[0] < 40


LSTM_INPUTS = [(5, 3), (1, 4), (1, 4), (16, 3), (16, 4), (16,)]
OPERATIONS = {  # with the places of the inputs that carry no gradient
    "lstm": lambda: (torch.ops.dynlm.lstm, tuple(draw(*s, seed=i) for i, s in enumerate(LSTM_INPUTS)), (1, 2)),
    "gru": lambda: (torch.ops.dynlm.gru, (draw(5, 2, 9), draw(9, 3, seed=1)), ()),
}


@QUIET
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_operations_are_registered_as_torch_asks(name):
    """Schema, shapes of fake tensors, autograd and tracing, by torch's own checks."""
    operation, arguments, constant = OPERATIONS[name]()
    for i, argument in enumerate(arguments):
        argument.requires_grad_(i not in constant)
    torch.library.opcheck(operation.default, arguments)


@pytest.mark.parametrize("batch", [1, 2])
def test_functional_gradients_are_autograds(batch):
    x, state, weights = layer(batch=batch)
    leaves = [w.clone().requires_grad_() for w in weights]
    expected = torch.autograd.grad(layer_loss(x, state, *leaves), leaves)
    found = torch.func.grad(layer_loss, argnums=(2, 3, 4))(x, state, *weights)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_each_example_are_those_of_one_at_a_time():
    _, state, weights = layer()
    xs, of_weights = draw(3, 1, 5, 3, seed=8), (2, 3, 4)
    each = torch.func.vmap(torch.func.grad(layer_loss, argnums=of_weights), in_dims=(0, None, None, None, None))
    alone = [torch.func.grad(layer_loss, argnums=of_weights)(x, state, *weights) for x in xs]
    for k, grads in enumerate(each(xs, state, *weights)):
        torch.testing.assert_close(grads, torch.stack([grad[k] for grad in alone]))


def test_second_derivatives_and_jacobian_products_are_right_or_an_error():
    x, state, weights = layer()
    direction = draw(16, 4, seed=9)

    def loss(weight_hh):
        return layer_loss(x, state, weights[0], weight_hh, weights[2])

    product = torch.func.jvp(torch.func.grad(loss), (weights[1],), (direction,))[1]
    step = 1e-2
    apart = torch.func.grad(loss)(weights[1] + step * direction) - torch.func.grad(loss)(weights[1] - step * direction)
    torch.testing.assert_close(product, apart / (2 * step), rtol=2e-2, atol=2e-2)
    leaf = weights[1].clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_gru_is_differentiated_twice_where_that_is_asked():
    gates, recurrent = draw(4, 2, 9).double(), draw(9, 3).double()
    with differentiable_twice():
        assert torch.autograd.gradgradcheck(gru, (gates.requires_grad_(), recurrent.requires_grad_()))
    expected = torch.autograd.grad(gru(gates, recurrent).square().sum(), recurrent)[0]
    found = torch.func.grad(lambda u: gru(gates.detach(), u).square().sum())(recurrent.detach())
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(gru(gates, recurrent).square().sum(), recurrent, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_deep_copy_learns_by_itself():
    model, x = language_model(), ids(1, 6)
    first = gradients(lambda: model(x, labels=x).loss, model)
    twin = copy.deepcopy(model)
    assert_same(gradients(lambda: twin(x, labels=x).loss, twin), first)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert_same(gradients(lambda: model(x, labels=x).loss, model), first)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("wrong", ["h", "c", "both", "batch", "weight", "bias"])
def test_a_state_one_row_short_is_an_error_before_torchs_kernel(wrong, learns, batch):
    """torch's kernel reads past it: ``munmap_chunk(): invalid pointer``."""
    x, (h, c), weights = layer(width=64, batch=batch)
    h = h[:, :-1] if wrong in ("h", "both") else h
    c = c[:, :-1] if wrong in ("c", "both") else c
    h = torch.cat([h, h]) if wrong == "batch" else h
    weights[1] = weights[1][:-1] if wrong == "weight" else weights[1]
    weights[2] = weights[2][:-1] if wrong == "bias" else weights[2]
    with torch.set_grad_enabled(learns), pytest.raises(InputError, match=r"does not fit: \w+ is .*, not "):
        lstm_layer(x, (h, c), *[w.clone().requires_grad_() for w in weights])
