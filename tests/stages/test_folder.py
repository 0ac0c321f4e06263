"""The model folder of a run is a whole folder of transformers, whoever opens it."""

import os
import subprocess
import sys

from transformers import AutoTokenizer, GenerationConfig

from dynlm.data.tokenizers import load_tokenizer
from dynlm.models.causal import load_model
from dynlm.runs import Run

TEXT = "The  list\n\n é ▁ <unk>\tmethod\n"
STRANGER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "dynlm" not in sys.modules
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
texts = tokenizer(["def", "The list of methods"], return_tensors="pt", padding=True, padding_side="left")
written = model.generate(**texts, max_new_tokens=3, do_sample=False)
assert written.shape[1] > texts["input_ids"].shape[1]
model.save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
assert sys.modules[type(model).__module__].__name__ == "dynlm.models.lstm"
"""


def test_a_program_without_dynlm_reads_and_writes_it(finished, tmp_path):
    run = Run(finished[1])
    again = tmp_path / "again"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STRANGER, str(run.model), str(again)],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    assert {path.name for path in again.iterdir()} == {path.name for path in run.model.iterdir()}
    assert (again / "dynlm_lstm.py").read_text() == (run.model / "dynlm_lstm.py").read_text()
    assert (again / "model.safetensors").read_bytes() == (run.model / "model.safetensors").read_bytes()


def test_tokens_and_special_tokens_are_the_run_s(finished):
    run = Run(finished[1])
    own, loaded = load_tokenizer(run.tokenizer), AutoTokenizer.from_pretrained(run.model)
    assert loaded(TEXT)["input_ids"] == own.encode(TEXT)
    expected = (own.start_id, own.eos_id, own.unk_id)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == expected
    for found in (load_model(run.model).config, GenerationConfig.from_pretrained(run.model)):
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == expected
