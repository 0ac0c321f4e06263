"""Which parameters are adapted, how they are seen, and that other tensors can stand in for them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from dynlm.models.params import adapted_parameters, as_matrix, flat_view, get_params, matched_parameters, pointed
from dynlm.types import InputError
from lab import make_lab


def test_a_tied_tensor_counts_once_under_its_first_name():
    model = make_lab()[0]
    names = [a.name for a in adapted_parameters(model)]
    assert names.count("embedding.weight") == 1
    assert "lm_head.weight" not in names
    assert [a.name for a in adapted_parameters(model, ("lm_head.*",))] == ["lm_head.weight", "lm_head.bias"]


def test_matrices_share_storage_with_their_parameters():
    layer = nn.Conv1d(3, 4, 2)
    weight, bias = adapted_parameters(layer)
    assert (weight.matrix_RC.shape, bias.matrix_RC.shape) == ((4, 6), (1, 4))
    weight.matrix_RC.fill_(7)
    assert (layer.weight == 7).all()
    assert as_matrix(torch.tensor(2.0)).shape == (1, 1)


def test_a_glob_that_matches_nothing_names_the_nearest_parameter():
    with pytest.raises(InputError, match=r"'layer\.0\.bias' matches no parameter .* did you mean 'layers\.0\.bias'"):
        adapted_parameters(make_lab()[0], ("*", "layer.0.bias"))


def test_frozen_parameters_are_left_out():
    model = Tied()
    model.blocks.requires_grad_(False)
    assert [a.name for a in adapted_parameters(model)] == ["embedding.weight", "unused.weight", "unused.bias"]
    assert [a.name for a in adapted_parameters(model, ("blocks.*", "unused.bias"))] == ["unused.bias"]
    assert "frozen" in [a.name for a in matched_parameters(model, ("*",))]
    with pytest.raises(InputError, match=r"all parameters of Tied that match blocks\.\* frozen are frozen \('frozen'"):
        adapted_parameters(model, ("blocks.*", "frozen"))


def test_integer_and_strided_parameters_are_refused():
    module = nn.Module()
    module.register_parameter("packed", nn.Parameter(torch.arange(3, dtype=torch.uint8), requires_grad=False))
    with pytest.raises(InputError, match=r"\('packed', torch.uint8\): .* cannot be adapted: use LoRA"):
        adapted_parameters(module)
    module.register_parameter("low_rank", nn.Parameter(torch.ones(2, 3)))
    assert [a.name for a in adapted_parameters(module)] == ["low_rank"]
    module = nn.Module()
    module.register_parameter("turned", nn.Parameter(torch.ones(2, 3).t()))
    with pytest.raises(InputError, match="'turned' is not contiguous"):
        adapted_parameters(module)


class WeightDrop(nn.Module):
    """The recurrent weights of an nn.LSTM, dropped as in AWD-LSTM: the raw matrix is the parameter, not the LSTM's."""

    def __init__(self, p=0.0):
        super().__init__()
        self.lstm = nn.LSTM(3, 4)
        raw = self.lstm.weight_hh_l0
        del self.lstm._parameters["weight_hh_l0"]
        self.weight_hh_raw = nn.Parameter(raw.detach())
        self.p = p

    def forward(self, x):
        raw = self.weight_hh_raw
        # an undropped raw weight is cloned: a module that is given a Parameter would make it its own
        self.lstm.weight_hh_l0 = F.dropout(raw, self.p) if self.training and self.p else raw.clone()
        return self.lstm(x)[0]


class Tied(nn.Module):
    """Embedding and head share a matrix; one block is used twice, another not at all, and a scale is frozen."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        block = nn.Linear(3, 3)
        self.blocks = nn.ModuleList([block, nn.Sequential(nn.Tanh(), block)])
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.tensor(1.5), requires_grad=False)

    def forward(self, x):
        hidden = self.embedding(x.argmax(-1)) + x
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.frozen * hidden)


class Containers(nn.Module):
    """Parameters in a list, in a dictionary, and in a module inside a module inside a list."""

    def __init__(self):
        super().__init__()
        self.items = nn.ParameterList([torch.randn(3), torch.randn(3)])
        self.named = nn.ParameterDict({"scale": torch.randn(3), "nested": nn.ParameterList([torch.randn(3)])})
        self.deep = nn.ModuleList([nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))})])

    def forward(self, x):
        x = self.named["scale"] * x + self.named["nested"][0]
        for item in self.items:
            x = x * item
        return self.deep[0]["a"](x)


class Recurrent(nn.Module):
    """torch's own recurrent layers, which keep a second list of their weights."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(3, 4, num_layers=2, bidirectional=True), nn.GRU(8, 2)

    def forward(self, x):
        return self.gru(self.lstm(x)[0])[0]


MODELS = {"tied": Tied, "containers": Containers, "recurrent": Recurrent, "weight drop": WeightDrop}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(3)
    return MODELS[request.param]().double()


def inputs():
    return torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def names_held(model):
    """What every place holds, seen from outside: qualified name to tensor, shared ones under every name."""
    return dict(model.named_parameters(remove_duplicate=False))


def test_get_params_walks_every_owner_once(model):
    walked = list(get_params(model))
    assert [id(p) for *_, p in walked] == [id(p) for p in model.parameters()]
    assert all(getattr(owner, name) is p for owner, name, p in walked)


def test_gradients_through_pointed_equal_functional_call(model):
    adapted, x = adapted_parameters(model), inputs()
    generator = torch.Generator().manual_seed(2)
    moved = [0.1 * torch.randn(a.matrix_RC.shape, generator=generator, dtype=torch.float64) for a in adapted]
    moved = [(a.matrix_RC + m).requires_grad_() for a, m in zip(adapted, moved, strict=True)]
    with pointed(adapted, [2 * m - m.detach() for m in moved]):  # nodes of a graph, not leaves
        actual = model(x)
    by_name = {a.name: m.view(a.parameter.shape) for a, m in zip(adapted, moved, strict=True)}
    expected = functional_call(model, by_name, (x,))
    assert not torch.equal(actual, model(x))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    ones = torch.ones_like(actual).cumsum(0)
    grads = torch.autograd.grad(actual, moved, 0.5 * ones, materialize_grads=True)
    expected_grads = torch.autograd.grad(expected, moved, ones, materialize_grads=True)
    for a, g, e in zip(adapted, grads, expected_grads, strict=True):
        assert a.name.startswith("unused") or e.abs().max() > 0
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-14, msg=lambda m, name=a.name: f"{name}: {m}")


def test_pointed_puts_the_same_parameters_back_also_after_an_exception(model):
    adapted, before, x = adapted_parameters(model), names_held(model), inputs()
    score = model(x)

    class BreakError(Exception):
        pass

    def break_inside(tensors):
        with pointed(adapted, tensors):
            model(x)
            raise BreakError

    halves = [0.5 * a.matrix_RC for a in adapted]
    with pytest.raises(BreakError):
        break_inside(halves)
    with pytest.raises(ValueError, match="shorter"), pointed(adapted, halves[:-1]):  # broken on the way in
        pass
    after = names_held(model)
    assert before.keys() == after.keys()
    assert all(after[name] is p and isinstance(p, nn.Parameter) for name, p in before.items())
    assert torch.equal(model(x), score)


def test_pointed_lets_all_places_of_a_tied_tensor_hold_one_stand_in():
    model = Tied()
    (embedding,) = adapted_parameters(model, ("embedding.weight",))
    assert [(type(p.owner), p.name) for p in embedding.places] == [(nn.Embedding, "weight"), (nn.Linear, "weight")]
    other = torch.randn(5, 3)
    with pointed([embedding], [other]):
        assert model.embedding.weight is model.head.weight
        assert model.head.weight.data_ptr() == other.data_ptr()
    assert model.embedding.weight is model.head.weight is embedding.parameter
    twice = adapted_parameters(model, ("blocks.1.1.*",))  # the second name of a module used twice
    assert [(a.name, len(a.places)) for a in twice] == [("blocks.1.1.weight", 1), ("blocks.1.1.bias", 1)]
    assert twice[0].places[0].owner is model.blocks[0]


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_pointed_keeps_the_second_list_of_recurrent_layers(kind):
    model = Recurrent()
    layer, other = (model.lstm, model.gru) if kind == "lstm" else (model.gru, model.lstm)
    adapted = adapted_parameters(model, (f"{kind}.*",))
    with pointed(adapted, [torch.zeros_like(a.matrix_RC) for a in adapted]):
        assert all((w == 0).all() for w in layer._flat_weights)
        assert (layer(torch.ones(2, 1, layer.input_size))[0] == 0).all()
        assert all(w is p for w, p in zip(other._flat_weights, other.parameters(), strict=True))
    assert all(w is p for w, p in zip(layer._flat_weights, layer.parameters(), strict=True))


def test_dropped_weights_follow_the_raw_stand_in():
    model = WeightDrop(p=0.5).double().train()
    adapted = adapted_parameters(model)
    assert "lstm.weight_hh_l0" not in [a.name for a in adapted]
    leaves = [a.matrix_RC.clone().requires_grad_() for a in adapted]
    torch.manual_seed(0)
    with pointed(adapted, leaves):
        output = model(inputs())
    assert model.lstm._flat_weights[1] is model.lstm.weight_hh_l0
    raw = leaves[[a.name for a in adapted].index("weight_hh_raw")]
    (grad,) = torch.autograd.grad(output.sum(), raw)
    assert torch.equal(grad != 0, model.lstm.weight_hh_l0 != 0), "only the weights that were kept get a gradient"
    assert (model.lstm.weight_hh_l0 == 0).any()


def test_flat_view_shares_storage_and_keeps_values_and_ties(model):
    before, score = {n: p.clone() for n, p in names_held(model).items()}, model(inputs())
    held = names_held(model)
    adapted = matched_parameters(model, ("*",))
    theta_N = flat_view(adapted)
    after = names_held(model)
    assert theta_N.shape == (sum(p.numel() for p in model.parameters()),)
    assert all(after[name] is held[name] for name in held), "ties and Parameter objects stay"
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(model(inputs()), score)
    again = flat_view(adapted)
    assert again.data_ptr() == theta_N.data_ptr()
    theta_N.fill_(0.25)
    assert all((p == 0.25).all() for p in model.parameters())
    adapted[-1].matrix_RC.fill_(7)
    assert (theta_N[-adapted[-1].parameter.numel() :] == 7).all()
    assert not theta_N.requires_grad


def test_flat_view_of_some_parameters_leaves_the_others():
    model = Tied()
    chosen = matched_parameters(model, ("blocks.*", "frozen"))
    others = {n: p.data_ptr() for n, p in names_held(model).items() if n.startswith(("embedding", "head", "unused"))}
    assert flat_view(chosen).shape == (13,)
    assert {n: p.data_ptr() for n, p in names_held(model).items() if n in others} == others


def test_flat_view_finds_its_buffer_again_around_an_empty_parameter():
    model = nn.ParameterList([torch.ones(2), torch.ones(0), torch.ones(3)])
    assert flat_view(adapted_parameters(model)).data_ptr() == flat_view(adapted_parameters(model)).data_ptr()


def test_flat_view_refuses_what_has_no_common_buffer():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double()])
    expected = r"^a flat view needs one dtype and device, found torch.float32 on cpu, torch.float64 on cpu: choose"
    with pytest.raises(InputError, match=expected):
        flat_view(adapted_parameters(model))
    with pytest.raises(InputError, match="no adapted parameter"):
        flat_view([])
