"""The small networks: shapes, causality, and what their parts compute."""

import pytest
import torch
import torch.nn.functional as F

from dynlm.labs.fewshot.nets import seeded
from dynlm.labs.general import nets
from dynlm.models.params import adapted_parameters

LANGUAGE_MODELS = {
    "gru": lambda: nets.GRULanguageModel(11, 8),
    "transformer": lambda: nets.TransformerLanguageModel(11, 8, 2, 2, 6),
    "lstm": lambda: nets.LSTMLanguageModel(11, 8),
    "llama": lambda: nets.Llama(11, 8, 2, 2),
}
IMAGE_NETWORKS = {
    "perceptron": lambda: nets.Perceptron([64, 9, 5]),
    "normalised perceptron": lambda: nets.Perceptron([64, 9, 9, 5], "gelu", True),
    "convolutional": lambda: nets.Convolutional(8, [4, 6], 5, "tanh", True),
    "mixer": lambda: nets.Mixer(8, 4, 12, 2, 5),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_are_causal_and_depend_on_what_came_before(name):
    net = seeded(LANGUAGE_MODELS[name], 0)
    ids_BS = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
    scores_BSV = net(ids_BS)
    assert scores_BSV.shape == (3, 6, 11)
    changed = ids_BS.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    moved = (net(changed) - scores_BSV).abs().amax((0, 2))
    assert moved[:3].max() < 1e-6
    assert moved[3:].min() > 1e-6
    torch.testing.assert_close(net(ids_BS[1:2]), scores_BSV[1:2])


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_image_networks_score_each_image_alone(name):
    net = seeded(IMAGE_NETWORKS[name], 0)
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scores = net(images)
    assert scores.shape == (4, 5)
    torch.testing.assert_close(net(images[1:3]), scores[1:3])


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, *IMAGE_NETWORKS])
def test_every_weight_is_contiguous_float32_and_gets_a_gradient(name):
    net = seeded((LANGUAGE_MODELS | IMAGE_NETWORKS)[name], 0)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 1, 8, 8, generator=generator)
    outputs = net(torch.randint(11, (4, 6), generator=generator) if name in LANGUAGE_MODELS else images)
    parameters = [a.parameter for a in adapted_parameters(net)]
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    grads = torch.autograd.grad(F.cross_entropy(outputs.flatten(0, -2), outputs.flatten(0, -2).argmin(1)), parameters)
    assert all(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("side", [5, 8])
def test_gathered_patches_are_a_convolution(side):
    net = seeded(lambda: nets.Convolutional(side, [3, 4], 2), 0)
    images = torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(0))
    expected = images
    for layer in net.features:
        if isinstance(layer, torch.nn.Linear):
            weight = layer.weight.view(len(layer.weight), -1, 3, 3)
            expected = F.relu(F.conv2d(expected, weight, layer.bias, stride=2, padding=1))
    torch.testing.assert_close(net(images), net.head(expected.mean((2, 3))))


def test_an_autoencoder_is_as_narrow_as_its_code():
    net = nets.Autoencoder(20, [10], 3)
    sizes = [layer.out_features for layer in net if isinstance(layer, torch.nn.Linear)]
    assert sizes == [10, 3, 10, 20]
    assert net(torch.zeros(2, 1, 4, 5)).shape == (2, 20)
