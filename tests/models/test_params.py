"""Which parameters are adapted, and how they are seen."""

import pytest
import torch
from torch import nn

from dynlm.models.params import adapted_parameters, as_matrix
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


def test_integer_and_strided_parameters_are_refused():
    module = nn.Module()
    module.register_parameter("count", nn.Parameter(torch.arange(3), requires_grad=False))
    with pytest.raises(InputError, match=r"'count' .* is not contiguous floating point"):
        adapted_parameters(module)
    module = nn.Module()
    module.register_parameter("turned", nn.Parameter(torch.ones(2, 3).t()))
    with pytest.raises(InputError, match="'turned'"):
        adapted_parameters(module)
