"""Padded places change no state and no score: each row is what it is alone, wherever the padding stands."""

import pytest
import torch

from dynlm.models.lstm import LSTMModel, ModelConfig
from dynlm.models.padding import padding_of
from dynlm.types import InputError

IDS = torch.randint(1, 11, (4, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 1]])


def make(layers=2, **settings):
    return ModelConfig(embedding_size=6, hidden_size=9, layers=layers, **settings).build(11, 0, seed=3).eval()


def some_hidden(model, batch):
    generator = torch.Generator().manual_seed(1)
    return tuple(tuple(torch.rand(s.shape, generator=generator) for s in pair) for pair in model.initial_hidden(batch))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("from_state", [False, True])
def test_each_row_is_what_it_is_alone(layers, from_state):
    model = make(layers)
    start = some_hidden(model, 4) if from_state else None
    output = model(IDS, attention_mask=MASK, hidden=start)
    for row in range(4):
        own = None if start is None else tuple((h[row : row + 1], c[row : row + 1]) for h, c in start)
        alone = model(IDS[row : row + 1, MASK[row] == 1], hidden=own)
        torch.testing.assert_close(output.logits[row, MASK[row] == 1], alone.logits[0], rtol=1e-5, atol=1e-6)
        for (h, c), (expected_h, expected_c) in zip(output.hidden, alone.hidden, strict=True):
            torch.testing.assert_close(h[row], expected_h[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(c[row], expected_c[0], rtol=1e-5, atol=1e-6)


def test_gradients_and_penalties_of_a_padded_batch_are_those_of_its_rows():
    settings = {"activation_regularization": 2.0, "temporal_activation_regularization": 1.0}
    model = make(**settings).train()
    labels = IDS.masked_fill((MASK == 0) | (MASK.cumsum(1) == 1), -100)  # nothing predicts a row's first token
    model(IDS[:2], attention_mask=MASK[:2], labels=labels[:2]).loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parts = [model(IDS[i : i + 1, MASK[i] == 1], labels=IDS[i : i + 1, MASK[i] == 1]) for i in range(2)]
    targets, tokens = torch.tensor([4.0, 2.0]), torch.tensor([5.0, 3.0])
    nats = sum((part.loss - part.penalty) * n for part, n in zip(parts, targets, strict=True)) / targets.sum()
    raw = [model(IDS[i : i + 1, MASK[i] == 1], output_hidden_states=True).hidden_states[-1] for i in range(2)]
    ar = sum(r.square().mean() * n for r, n in zip(raw, tokens, strict=True)) / tokens.sum()
    tar = sum(r.diff(dim=1).square().mean() * n for r, n in zip(raw, targets, strict=True)) / targets.sum()
    (nats + 2.0 * ar + 1.0 * tar).backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


def test_a_mask_of_ones_changes_nothing_and_may_be_longer_than_the_text():
    model = make()
    assert torch.equal(model(IDS, attention_mask=torch.ones_like(IDS)).logits, model(IDS).logits)
    assert padding_of(torch.ones(4, 12), 4, 7) is None
    longer = torch.cat([torch.zeros(4, 3), MASK], 1)
    assert torch.equal(model(IDS, attention_mask=longer).logits, model(IDS, attention_mask=MASK).logits)


def test_the_model_without_its_read_out_pads_alike():
    model, body = make(), LSTMModel(make().config).eval()
    body.load_state_dict({n: p for n, p in model.state_dict().items() if not n.startswith("lm_head")})
    expected = model(IDS, attention_mask=MASK, output_hidden_states=True)
    output = body(IDS, attention_mask=MASK, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, expected.hidden_states[-1])
    assert [tuple(x.shape) for x in output.hidden_states] == [(4, 7, 6), (4, 7, 9), (4, 7, 6)]


def test_a_padded_place_repeats_what_was_known_before_it():
    output = make()(IDS, attention_mask=MASK)
    before = [[None, None], [2, 2, 2, 2], [], [None, 1, 4]]  # the last token before each padded place
    for row, places in enumerate(before):
        for place, token in zip((MASK[row] == 0).nonzero().flatten(), places, strict=True):
            expected = make().lm_head.bias if token is None else output.logits[row, token]
            torch.testing.assert_close(output.logits[row, place], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("mask", [torch.ones(4, 1, 7, 7), torch.ones(3, 7), torch.ones(4, 6)])
def test_a_mask_of_another_shape_is_one_clear_line(mask):
    with pytest.raises(InputError, match=r"attention_mask has shape .*: expected \(4, 7\)"):
        make()(IDS, attention_mask=mask)


def test_a_row_without_a_token_is_one_clear_line():
    with pytest.raises(InputError, match="row 2 of attention_mask has no token"):
        make()(IDS, attention_mask=MASK * torch.tensor([[1], [1], [0], [1]]))
