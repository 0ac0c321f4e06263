"""``generate`` with a hidden state: what it writes is what reading all of the text again at every token would write."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast, pipeline

from dynlm.data.tokenizers import load_tokenizer
from dynlm.models.generation import CARRIED
from dynlm.models.lstm import LSTMConfig, LSTMForCausalLM
from dynlm.session.session import SHIPPED, shipped_models
from dynlm.types import InputError

VOCAB, NEW = 60, 12
WISH = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
IDS = torch.randint(1, VOCAB, (4, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    """Weights so far apart that every hidden state counts."""
    torch.manual_seed(0)
    config = LSTMConfig(vocab_size=VOCAB, embedding_size=24, hidden_size=20, num_hidden_layers=2, bos_token_id=0)
    model = LSTMForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return model


def reading_all_again(model, monkeypatch, ids, **wish):
    with monkeypatch.context() as patch:
        inputs = lambda input_ids, attention_mask=None, **_: {"input_ids": input_ids, "attention_mask": attention_mask}  # noqa: E731
        patch.setattr(model, "prepare_inputs_for_generation", inputs, raising=False)
        return model.generate(ids, **WISH | wish)


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("padded", ["", "left", "right"])
def test_beams_take_their_hidden_state_along(model, monkeypatch, beams, padded):
    mask = torch.ones_like(IDS)
    if padded:
        mask[0, :3] = mask[2, :1] = 0
        mask = mask if padded == "left" else mask.flip(1)
    wish = {"num_beams": beams, "num_return_sequences": beams, "attention_mask": mask}
    expected = reading_all_again(model, monkeypatch, IDS, **wish)
    assert torch.equal(model.generate(IDS, **WISH | wish), expected)
    assert torch.equal(model.generate(IDS, **WISH | wish | {"use_cache": False}), expected)
    if padded:
        alone = model.generate(IDS[:1, mask[0] == 1], **WISH | wish | {"attention_mask": torch.ones(1, 3)})
        assert torch.equal(alone[:, 3:], expected[:beams, 6:])


@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_of_embeddings_and_a_given_state_write_the_same(model, beams):
    wish = {**WISH, "num_beams": beams}
    expected = model.generate(IDS, **wish)[:, 6:]
    assert torch.equal(model.generate(inputs_embeds=model.embedding(IDS), **wish), expected)
    state = model(IDS[:, :2]).hidden
    assert torch.equal(model.generate(IDS[:, 2:], hidden=state, **wish)[:, 4:], expected)


def test_sampling_returns_several_sequences_and_all_that_was_asked_for(model):
    torch.manual_seed(0)
    wish = {**WISH, "do_sample": True, "num_return_sequences": 3, "return_dict_in_generate": True}
    output = model.generate(IDS, **wish, output_scores=True, output_hidden_states=True)
    assert output.sequences.shape == (12, 6 + NEW)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 12
    assert [len(output.scores), len(output.hidden_states)] == [NEW, NEW]
    assert output.hidden_states[0][-1].shape == (12, 6, 24)


@pytest.mark.parametrize(
    ("wish", "error", "words"),
    [
        ({"cache_implementation": "static"}, InputError, "takes no cache_implementation 'static'"),
        ({"cache_implementation": "quantized"}, InputError, "takes no cache_implementation 'quantized'"),
        ({CARRIED: DynamicCache()}, ValueError, "not used by the model"),
        ({"prompt_lookup_num_tokens": 2}, ValueError, "only supports .*greedy_search|stateful models"),
        ({"penalty_alpha": 0.6, "top_k": 4}, ValueError, "only supports .*greedy_search|trust_remote_code"),
        ({"output_attentions": True, "return_dict_in_generate": True}, InputError, "takes no output_attentions"),
    ],
)
def test_what_a_hidden_state_cannot_do_is_refused(model, wish, error, words):
    with pytest.raises(error, match=words):
        model.generate(IDS[:1], **WISH | wish)


def test_another_model_as_assistant_is_refused(model):
    with pytest.raises(ValueError, match=r"only supports .*greedy_search|stateful models"):
        model.generate(IDS[:1], **WISH, assistant_model=model)


def test_the_pipeline_writes_what_generate_writes(model, tmp_path):
    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>").save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == VOCAB
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    texts = [" ".join(f"w{i}" for i in row) for row in (IDS[0, :3], IDS[1])]  # the shorter one is padded
    found = write(texts, batch_size=2, max_new_tokens=5, do_sample=False, return_full_text=False)
    for text, ids, (got,) in zip(texts, (IDS[:1, :3], IDS[1:2]), found, strict=True):
        expected = model.generate(ids, **WISH | {"max_new_tokens": 5})[0, ids.shape[1] :]
        assert got["generated_text"].split() == [f"w{i}" if i else "<pad>" for i in expected.tolist()], text


@pytest.mark.parametrize("name", shipped_models())
def test_the_shipped_models_know_their_start_and_their_end(name):
    shipped = SHIPPED / name
    model = AutoModelForCausalLM.from_pretrained(shipped / "model").eval()
    tokenizer = load_tokenizer(shipped / "tokenizer")
    assert [model.config.bos_token_id, model.config.eos_token_id] == [tokenizer.eos_id] * 2
    written = model.generate(max_new_tokens=4, do_sample=False, pad_token_id=0)  # from the start token alone
    assert written[0, 0] == tokenizer.start_id
    assert written.shape[1] > 1
