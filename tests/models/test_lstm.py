"""The LSTM language model as transformers knows it."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from dynlm.models.causal import load_model
from dynlm.models.core import locked_dropout
from dynlm.models.lstm import LSTMModel, ModelConfig
from dynlm.types import InputError

TOKENS = torch.tensor([[1, 5, 3, 3, 7, 2]])


def make(**settings):
    return ModelConfig(**{"embedding_size": 6, "hidden_size": 9, **settings}).build(11, 0, seed=3)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_save_load_and_auto_class_keep_weights_tied(tmp_path, layers):
    model = make(layers=layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)  # none is what a fresh model begins with
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.embedding.weight
    assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)
    assert torch.equal(load_model(tmp_path)(TOKENS).logits, model(TOKENS).logits)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


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


def test_labels_to_ignore_and_a_count_of_items_are_those_of_transformers():
    model = make().eval()
    labels = TOKENS.masked_fill(TOKENS == 3, -100)
    logits = model(TOKENS).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
    torch.testing.assert_close(model(TOKENS, labels=labels).loss, nats / 3)
    torch.testing.assert_close(model(TOKENS, labels=labels, num_items_in_batch=torch.tensor(12)).loss, nats / 12)
    shifted = torch.cat([labels[:, 1:], torch.tensor([[-100]])], 1)
    torch.testing.assert_close(model(TOKENS, labels=labels, shift_labels=shifted).loss, nats / 3)


@pytest.mark.parametrize("num_items", [None, 20])
def test_a_penalty_counts_once_a_target(num_items):
    model = make(activation_regularization=2.0).train()
    output = model(TOKENS, labels=TOKENS, num_items_in_batch=num_items)
    share = 1 if num_items is None else 5 / 20
    plain = make().train()
    plain.load_state_dict(model.state_dict())
    expected = plain(TOKENS, labels=TOKENS, num_items_in_batch=num_items).loss + share * output.penalty
    assert output.penalty > 0
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("training", [False, True])
def test_embeddings_go_in_in_place_of_ids(training):
    model = make(layers=2).train(training)
    embeds = model.embedding(TOKENS)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(TOKENS).logits)
    for both in ({}, {"input_ids": TOKENS, "inputs_embeds": embeds}):
        with pytest.raises(InputError, match="either input_ids or inputs_embeds"):
            model(**both)


def test_outputs_are_tuples_states_and_last_logits_when_asked():
    model = make(layers=2).eval()
    output = model(TOKENS, labels=TOKENS, output_hidden_states=True)
    loss, logits, hidden, *_ = model(TOKENS, labels=TOKENS, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert torch.equal(hidden[1][0], output.hidden[1][0])
    assert [tuple(x.shape) for x in output.hidden_states] == [(1, 6, 6), (1, 6, 9), (1, 6, 6)]
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert model(TOKENS).hidden_states is None
    assert model(TOKENS, use_cache=False).hidden is None
    torch.testing.assert_close(model(TOKENS, logits_to_keep=2).logits, output.logits[:, -2:])


def test_arguments_that_would_be_ignored_are_refused():
    model = make().eval()
    restarting = torch.tensor([[0, 1, 2, 0, 1, 2]])  # two texts in one row, as padding-free collators pack them
    with pytest.raises(InputError, match="LSTMForCausalLM takes no output_attentions, position_ids"):
        model(TOKENS, position_ids=restarting, output_attentions=True)
    assert model(TOKENS, position_ids=None, output_attentions=False).logits.shape == (1, 6, 11)


def test_a_hidden_state_of_another_shape_is_one_clear_line():
    model = make(layers=2).eval()
    hidden = model(TOKENS).hidden
    for wrong in (hidden[:1], tuple((h[:, 1:], c) for h, c in hidden), ((hidden[0][0],), hidden[1])):
        with pytest.raises(InputError, match=r"the hidden state has shapes .*: this model and batch need"):
            model(TOKENS, hidden=wrong)


@pytest.mark.parametrize("vocab_size", [14, 8])
def test_resizing_the_vocabulary_keeps_the_ends_tied_and_old_scores(vocab_size):
    model, old = make().eval(), make().eval()
    model.resize_token_embeddings(vocab_size)
    assert model.lm_head.weight is model.embedding.weight
    assert [model.config.vocab_size, model.lm_head.bias.shape[0]] == [vocab_size, vocab_size]
    kept = min(11, vocab_size)
    torch.testing.assert_close(model(TOKENS).logits[..., :kept], old(TOKENS).logits[..., :kept])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_saved_and_loaded(tmp_path, dtype, tied):
    model = make()
    model.config.tie_word_embeddings = tied
    model = type(model)(model.config).to(dtype).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert again.dtype == dtype
    assert (again.lm_head.weight is again.embedding.weight) == tied
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    # where weights lie in memory may decide the order of a product's sums
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(wide(TOKENS).logits, model(TOKENS).logits.float(), rtol=2e-2, atol=2e-3)


def test_the_auto_model_is_the_model_without_its_read_out(tmp_path):
    model = make(layers=2).eval()
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(body, LSTMModel)
    states = model(TOKENS, output_hidden_states=True).hidden_states
    assert torch.equal(body(TOKENS).last_hidden_state, states[-1])
    last, hidden = body(TOKENS, return_dict=False)
    assert torch.equal(last, states[-1])
    assert len(hidden) == 2


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
    with pytest.raises(InputError, match=r"layers is 4: expected a whole number from 1 to 3"):
        make(layers=4)
    with pytest.raises(InputError, match=r"holds no model \(config\.json\)"):
        load_model(tmp_path)
    make().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="is not a whole model"):
        load_model(tmp_path)
