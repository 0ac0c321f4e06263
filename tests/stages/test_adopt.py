"""A model that was trained elsewhere, taken into a run: every stage works on it, whole or with low-rank weights."""

import json
import re
import shutil
import sys
from unittest import mock

import pytest
import torch

from dynlm.cli.main import main
from dynlm.data.tokenizers import load_tokenizer
from dynlm.files import read_tensors
from dynlm.runs import Run
from dynlm.session.session import load_session
from support.commands import fails, files

pytestmark = [
    pytest.mark.usefixtures("plain_reports"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

LORA = ["--lora.rank", "2", "--lora.targets", "*.c_attn"]


def test_the_tokenizer_stands_beside_the_model(ready, tmp_path):
    from transformers import AutoTokenizer

    assert main(["train", str(ready[0]), "--run", str(tmp_path / "run")]) == 0
    run = Run(tmp_path / "run")
    loaded = AutoTokenizer.from_pretrained(run.model)
    assert loaded("The cat\n")["input_ids"] == load_tokenizer(run.tokenizer).encode("The cat\n")
    assert loaded.bos_token == "<s>"


@pytest.fixture
def broken(ready, tmp_path):
    """A copy of the model folder, to break, and the arguments that take it up."""
    shutil.copytree(ready[1], tmp_path / "model")
    return tmp_path / "model", ["train", ready[0], "--run", tmp_path / "run", "--model.pretrained", tmp_path / "model"]


@pytest.mark.parametrize("flags", [pytest.param([], id="whole", marks=pytest.mark.slow), pytest.param(LORA, id="lora")])
def test_every_stage_works_on_a_ready_model(ready, tmp_path, capsys, flags):
    recipe, run = str(ready[0]), Run(tmp_path / "run")
    text = tmp_path / "a.txt"
    text.write_text("The cat sat on the mat. The cat liked the mat.\n" * 8)
    for command in ("train", "tune", "meta-train", "evaluate", "audit"):
        quick = ["--audit.quick"] if command == "audit" else []
        assert main([command, recipe, "--run", str(run.path), *flags, *quick]) == 0
        if command == "train":
            said = capsys.readouterr().out
    told = re.search(r"GPT2LMHeadModel: ([\d,]+) weights, ([\d,]+) adapted", said)
    total, adapted = (int(number.replace(",", "")) for number in told.groups())
    results = json.loads(run.results.read_text())
    assert results["model"]["adapted"] == adapted
    assert results["model"]["parameters"] == total
    assert adapted < 0.02 * total if flags else adapted == total
    names = set(read_tensors(run.prior)[0])
    assert all("lora_" in name for name in names) == bool(flags)
    assert results["methods"]["rms"]["nats"] != results["methods"]["static"]["nats"]
    assert "every check passed" in capsys.readouterr().out
    assert main(["read", str(text), "--run", str(run.path), "--quiet"]) == 0
    assert "gain" in capsys.readouterr().out


def test_low_rank_weights_are_the_same_each_time(ready, tmp_path):
    run = str(tmp_path / "run")
    for command in ("train", "tune"):
        assert main([command, str(ready[0]), "--run", run, *LORA]) == 0
    a, b = (load_session(run) for _ in range(2))
    assert a.config.params == ("*.lora_A.*", "*.lora_B.*")
    assert a.fingerprints(a.rule("rms")) == b.fingerprints(b.rule("rms"))
    assert all(torch.equal(p.theta0, q.theta0) for p, q in zip(a.priors, b.priors, strict=True))
    assert any(p.theta0.any() for p in a.priors)


def test_settings_that_cannot_be_are_one_clear_line(ready, tmp_path, capsys, monkeypatch):
    base = ["train", ready[0], "--run", tmp_path / "run"]
    fails(capsys, [*base, "--model.pretrained", tmp_path / "none"], "none holds no model")
    fails(capsys, [*base, "--model.pretrained", "nobody/nothing", "--tokenizer.name", ready[1]], "no hub model")
    fails(capsys, [*base, "--tokenizer.kind", "word"], "knows other tokens")
    fails(
        capsys, [*base, "--lora.rank", "2", "--lora.targets", "*.c_atn"], "'*.c_atn' matches no linear layer", "c_attn"
    )
    fails(capsys, [*base, "--lora.rank", "-2"], "lora.rank is -2")
    fails(
        capsys,
        [*base, *LORA, "--read.params", "*wte*"],
        "'transformer.wte.weight'",
        "frozen beside weights of rank 2",
        "(--lora.rank)",
    )
    fails(capsys, [*base, "--model.pretrained", "", *LORA], "an LSTM takes no low-rank weights")
    fails(capsys, [*base, "--read.segment", "65"], "65 tokens does not fit into 64")
    fails(capsys, [*base, "--context.window", "65"], "lower it to 64")
    fails(capsys, [*base, "--data.source", tmp_path / "none.txt"], "file does not exist")
    monkeypatch.setitem(sys.modules, "peft", None)
    fails(capsys, [*base, *LORA], 'pip install "dynlm[lora]"')
    assert not (tmp_path / "run").exists() or not files(tmp_path / "run")


def test_a_model_without_its_tokenizer_or_with_another_s(broken, capsys):
    folder, base = broken
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    fails(capsys, base, "tokenizer", "cannot be loaded (it has no entries)", "`hf download`")
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"vocab_size": 40, "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    fails(capsys, [*base, "--tokenizer.name", folder.parent / "none"], "cannot be loaded")


def test_a_tokenizer_with_more_entries_than_the_model(ready, broken, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder, base = broken
    size = {"vocab_size": 40, "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    fails(capsys, base, "the tokenizer has 300 entries, GPT2LMHeadModel has 40")


def test_weights_that_are_not_finite_and_models_that_see_later_tokens(broken, capsys):
    from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

    folder, base = broken
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.transformer.ln_f.bias.data.fill_(float("nan"))
    model.save_pretrained(folder)
    fails(capsys, base, "not finite")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertLMHeadModel(BertConfig(vocab_size=300, max_position_embeddings=64, **size, is_decoder=False)).save_pretrained(
        folder
    )
    fails(capsys, base, "sees later tokens")


def test_nothing_finished_is_replaced_unasked_and_low_rank_weights_stay(ready, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(ready[0]), "--run", str(run)]) == 0
    before = files(run)
    fails(capsys, ["train", ready[0], "--run", run], "exists", "--overwrite")
    fails(capsys, ["tune", ready[0], "--run", run, *LORA], "lora.rank is 2", "was made with 0")
    assert files(run) == before
    assert main(["train", str(ready[0]), "--run", str(run), "--overwrite"]) == 0


def test_a_table_of_a_recipe_leaves_the_rest_of_it_at_its_defaults(tmp_path):
    from dynlm.stages.recipe import Recipe, load_recipe

    (tmp_path / "r.toml").write_text("[lora]\nalpha = 4\n[start.outer]\nlr = 1e-4\n")
    recipe, default = load_recipe(tmp_path / "r.toml"), Recipe()
    assert (recipe.lora.rank, recipe.lora.alpha) == (0, 4.0)
    assert (recipe.start.outer.lr, recipe.start.outer.steps) == (1e-4, default.start.outer.steps)


@pytest.mark.parametrize(("kind", "carry"), [("replay", "overlap"), ("replay", "cache"), ("unroll", "overlap")])
@pytest.mark.parametrize("flags", [[], LORA], ids=["whole", "lora"])
def test_meta_training_of_a_ready_model_is_foretold(ready, tmp_path, capsys, kind, carry, flags):
    some = ["--meta.estimator.kind", kind, "--context.carry", carry, "--meta.truncation", "8", "--run", tmp_path / "no"]
    arguments = ["plan", ready[0], *some, *flags]
    assert main(list(map(str, arguments))) == 0
    out = capsys.readouterr().out
    weights = int(re.search(r"([\d,]+) adapted weights", out)[1].replace(",", ""))
    assert (weights < 10_000) == bool(flags)
    assert "s a meta-step" in out
    fails(capsys, [*arguments, "--plan.memory", "1"], "MiB, the limit is 1")
    assert not (tmp_path / "no").exists()


def test_a_plan_reads_behind_as_much_text_as_the_model_sees(ready):
    from dynlm.models.causal import CausalScorer, load_model
    from dynlm.models.context import ContextConfig
    from dynlm.stages.plan import InMidText

    model = load_model(ready[1])
    ids_S = torch.arange(8)
    for carry in ("overlap", "cache"):
        score = CausalScorer(model, ContextConfig(carry=carry))
        with mock.patch.object(score, "_forward", wraps=score._forward) as forward:
            InMidText(score, 8, 300)(ids_S, ids_S, None)
        seen = [call.args[0].numel() for call in forward.call_args_list]
        assert seen == ([64, 64] if carry == "overlap" else [64 - 4 * 8, 8])
    assert InMidText(CausalScorer(model, ContextConfig(carry="none")), 8, 300).before is None
