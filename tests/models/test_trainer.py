"""transformers' ``Trainer`` on the LSTM: a batch in parts trains as the whole does, and labels mean what they mean."""

import inspect

import pytest
import torch
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.trainer_pt_utils import LabelSmoother

from dynlm.models.lstm import LSTMConfig, LSTMForCausalLM

VOCAB, LENGTH = 50, 12


def make_data():
    """Rows that are padded on the right by 0 to 6 tokens, with labels to ignore among them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (16, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < 12 - torch.arange(16)[:, None] % 7).long()
    labels = ids.masked_fill((mask == 0) | (ids % 5 == 0), -100)
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return [{name: column[row] for name, column in columns.items()} for row in range(16)]


def train(tmp_path, batch, accumulate, smoothing=0.0, **config):
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=VOCAB, embedding_size=16, hidden_size=16, **config))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path / f"{batch}"),
        max_steps=2,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        label_smoothing_factor=smoothing,
        optim="sgd",
        learning_rate=0.5,
        logging_steps=1,
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=make_data(), eval_dataset=make_data())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    change = torch.cat([(p - start[name]).flatten() for name, p in model.named_parameters()])
    return trainer, [entry["loss"] for entry in logs], change.detach()


COUNTS = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters
NOT_OURS = pytest.mark.skipif(not COUNTS, reason="transformers before 5.16 smooths each micro-batch as a whole")


@pytest.mark.parametrize("smoothing", [0.0, pytest.param(0.1, marks=NOT_OURS)])
def test_accumulated_batches_equal_the_whole_batch(tmp_path, smoothing):
    _, whole, by_whole = train(tmp_path, 8, 1, smoothing)
    _, parts, by_parts = train(tmp_path, 2, 4, smoothing)
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(by_parts, by_whole, rtol=1e-3, atol=1e-6)
    assert 3.5 < whole[0] < 3.95  # log 50 is 3.91: a fresh model knows nothing; old releases count the first tokens too


def test_penalties_are_accumulated_too(tmp_path):
    settings = {"activation_regularization": 50.0, "temporal_activation_regularization": 50.0}
    plain = train(tmp_path, 8, 1)[1]
    _, whole, by_whole = train(tmp_path, 8, 1, **settings)
    _, parts, by_parts = train(tmp_path, 2, 4, **settings)
    assert whole[0] > plain[0] + 1e-3
    assert parts == pytest.approx(whole, abs=0.05 * (whole[0] - plain[0]))  # parts differ in how many places they have
    assert torch.cosine_similarity(by_parts, by_whole, dim=0) > 0.999


def test_label_smoothing_smooths_the_token_that_follows(tmp_path):
    trainer, losses, _ = train(tmp_path, 8, 1, 0.1)
    assert losses[1] < losses[0]
    batch = default_data_collator(make_data()[:8])
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.1)
        found = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(found, expected)


def test_evaluation_hands_over_logits_alone(tmp_path):
    trainer, _, _ = train(tmp_path, 8, 1)
    with torch.no_grad():
        expected = trainer.model.eval()(**default_data_collator(make_data())).logits
    predictions = torch.from_numpy(trainer.predict(make_data()).predictions)
    torch.testing.assert_close(predictions, expected)
