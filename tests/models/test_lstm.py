"""The LSTM language model as transformers knows it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dynlm.models.causal import load_model
from dynlm.models.lstm import ModelConfig, locked_dropout
from dynlm.types import InputError

TOKENS = torch.tensor([[1, 5, 3, 3, 7, 2]])


def make(**settings):
    return ModelConfig(**{"embedding_size": 6, "hidden_size": 9, **settings}).build(11, 0, seed=3)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_save_load_and_auto_class_keep_weights_tied(tmp_path, layers):
    model = make(layers=layers).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.embedding.weight
    assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)
    assert torch.equal(load_model(tmp_path)(TOKENS).logits, model(TOKENS).logits)


def test_hidden_state_carries_over_a_cut():
    model = make(layers=2).eval()
    whole = model(TOKENS).logits
    first = model(TOKENS[:, :2])
    second = model(TOKENS[:, 2:], hidden=first.hidden)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-5, atol=1e-6)


def test_generate_equals_greedy_decoding_by_hand():
    model = make().eval()
    tokens = TOKENS
    for _ in range(4):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    generated = model.generate(TOKENS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generated, tokens)


def test_labels_give_the_shifted_mean_loss():
    model = make().eval()
    expected = torch.nn.functional.cross_entropy(model(TOKENS).logits[0, :-1], TOKENS[0, 1:])
    torch.testing.assert_close(model(TOKENS, labels=TOKENS).loss, expected)


@pytest.mark.parametrize(
    "name", ["embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_drop"]
)
def test_each_dropout_acts_in_training_only(name):
    model = make(layers=2, **{name: 0.5})
    torch.manual_seed(0)
    model.train()
    assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    model.eval()
    assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("name", ["activation_regularization", "temporal_activation_regularization"])
def test_activation_penalties_raise_the_training_loss_only(name):
    model = make(**{name: 2.0})
    plain = make()
    plain.load_state_dict(model.state_dict())
    assert model(TOKENS, labels=TOKENS).loss > plain(TOKENS, labels=TOKENS).loss
    assert torch.equal(model.eval()(TOKENS, labels=TOKENS).loss, plain.eval()(TOKENS, labels=TOKENS).loss)


def test_locked_dropout_keeps_one_mask_a_sequence():
    torch.manual_seed(0)
    dropped = locked_dropout(torch.ones(2, 5, 50), 0.4, training=True)
    assert torch.equal(dropped[:, 0], dropped[:, 4])
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1 / 0.6]))


def test_bad_models_are_one_clear_line(tmp_path):
    with pytest.raises(InputError, match=r"model\.layers is 4: expected 1 to 3"):
        make(layers=4)
    with pytest.raises(InputError, match=r"holds no model \(config\.json\)"):
        load_model(tmp_path)
    make().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="is not a whole model"):
        load_model(tmp_path)
