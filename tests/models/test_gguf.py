"""A model in one .gguf file, as llama.cpp keeps it, reads as the same model in a folder."""

import numpy as np
import pytest
import torch

import dynlm
from dynlm.models.causal import load_model
from dynlm.types import InputError

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
SIZES = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64)).eval()


@pytest.fixture(scope="module")
def path(llama, tmp_path_factory):
    """The model with a tokenizer of bytes, written as llama.cpp writes it: its rotary halves lie interleaved."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(1)
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(llama.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(SIZES["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    tokens = [*bytes_to_unicode().values(), "th", "<|endoftext|>", "</s>", "<unk>", "<pad>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] * 4)
    writer.add_token_merges(["t h"])  # a tokenizer of this kind has some
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    for name, tensor in llama.state_dict().items():
        array = tensor.numpy()
        if ".q_proj" in name or ".k_proj" in name:
            array = array.reshape(2, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(written(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def written(name):
    whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in whole:
        return f"{whole[name]}.weight"
    return f"blk.0.{NAMES[name.removeprefix('model.layers.0.').removesuffix('.weight')]}.weight"


def test_weights_are_those_of_the_model(llama, path):
    ids = torch.arange(20)[None]
    torch.testing.assert_close(load_model(path)(ids).logits, llama(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_file_is_read_with_its_own_tokenizer(path):
    text = "Quernmoor met Ellisande. Ellisande saw Quernmoor, and Quernmoor left.\n" * 4
    reading = dynlm.Reader.from_pretrained(path, rule="sgd", prior_text=()).read(text)
    assert "".join(token.text for token in reading.tokens) == text
    assert reading.gain > 0


def test_a_broken_or_missing_file_is_one_clear_line(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    for name, said in (("x.gguf", "is not a whole model"), ("none.gguf", "holds no model")):
        with pytest.raises(InputError, match=said):
            load_model(tmp_path / name)
