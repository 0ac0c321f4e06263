"""`dynlm read --model`: a ready model without a run."""

import json
import os
import random
import string
from itertools import permutations

import pytest
import torch

import dynlm.session.prior
from dynlm.cli.main import main
from dynlm.meta.tune import search_space
from dynlm.optim.handmade import RMS, Static
from dynlm.optim.hub import load
from dynlm.optim.registry import RULES, tuned
from dynlm.session.reader import Reader
from dynlm.session.ready import CAUTION, PRIOR_TOKENS, ready_session, untuned_rule
from support.commands import fails

TEXT = "The cat sat on the mat. The cat liked the mat, and sat on it.\n" * 12
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    return str(tmp_path / "a.txt")


@pytest.fixture
def model(ready):
    return str(ready[1])


def test_a_model_without_a_run_learns_while_it_reads(model, text, capsys):
    assert main(["read", text, "--model", model]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(TEXT)
    assert "gated" in out
    assert "gain +" in out
    assert "measured on Python's documentation" in err


def test_text_for_the_prior_low_rank_weights_and_memories(model, text, tmp_path, capsys):
    (tmp_path / "prior.txt").write_text(TEXT * 3)
    base = ["read", text, "--model", model, "--quiet", "--prior-text", str(tmp_path / "prior.txt")]
    memory = str(tmp_path / "memory")
    assert main([*base, "--lora-rank", "2", "--carry", "overlap", "--save-memory", memory]) == 0
    out, err = capsys.readouterr()
    assert "documentation" not in err
    assert "gain +" in out
    assert main([*base, "--lora-rank", "2", "--carry", "overlap", "--load-memory", memory]) == 0
    fails(capsys, [*base, "--load-memory", memory], "belongs to another model")


def test_a_memory_knows_the_frozen_weights_too(model, tmp_path):
    from transformers import AutoModelForCausalLM

    (tmp_path / "prior.txt").write_text(TEXT)
    settings = {"lora_rank": 2, "prior_text": [str(tmp_path / "prior.txt")]}
    kit, other = ready_session(model, **settings), ready_session(model, **settings)
    assert kit.fingerprints(Static())["model"] == other.fingerprints(Static())["model"]
    assert kit.config.params == ("*.lora_A.*", "*.lora_B.*")
    with torch.no_grad():
        other.model.transformer.wpe.weight[0, 0] += 1
    assert kit.fingerprints(Static())["model"] != other.fingerprints(Static())["model"]
    assert isinstance(AutoModelForCausalLM, type)


def test_rules_start_where_tuning_starts(model, tmp_path):
    (tmp_path / "prior.txt").write_text(TEXT)
    kit = ready_session(model, prior_text=[str(tmp_path / "prior.txt")])
    rule = untuned_rule("rms", kit)
    assert isinstance(rule, RMS)
    mean = sum(p.mean_rms for p in kit.priors) / len(kit.priors)
    start = search_space("rms", kit.priors)
    assert rule.settings() == pytest.approx({"lr": CAUTION * start["lr"].start, "eps": 0.5 * mean, "decay": 1e-3})
    assert untuned_rule("adam", kit, lr=1e-4).settings()["lr"] == pytest.approx(1e-4)
    assert not untuned_rule("static", kit).reads_gradient
    learned, reader = untuned_rule("gated", kit), load("reader")
    assert (learned.config.lr, learned.config.eps) == (rule.settings()["lr"], rule.settings()["eps"])
    for name, tensor in reader.state_dict().items():
        assert torch.equal(learned.state_dict()[name], tensor)


def test_the_prior_is_measured_on_few_segments_and_not_at_all_where_nothing_is_learned(model, text, monkeypatch):
    measured = []
    real = dynlm.session.prior.measure_priors

    def spy(model, score, pieces, params):
        pieces = list(pieces)
        measured.append(sum(inputs_S.numel() for inputs_S, _ in pieces))
        return real(model, score, iter(pieces), params)

    monkeypatch.setattr(dynlm.session.prior, "measure_priors", spy)
    assert Reader(ready_session(model, prior_text=[text]), "static").read(TEXT).gain == 0
    assert measured == []
    for rule in tuned():
        untuned_rule(rule, ready_session(model, prior_text=[text]))
    assert len(measured) == len(tuned())
    assert max(measured) <= PRIOR_TOKENS <= 512


@pytest.mark.parametrize("rule", tuned())
def test_a_first_step_promises_the_same_fall_of_the_loss_on_models_of_any_size(rule, model, text):
    priors = ready_session(model, prior_text=[text]).priors
    start = RULES[rule].space["lr"].start
    for times in (1e3, 1e5):  # gradients of larger models
        larger = [
            p._replace(rms=times * p.rms, mean_rms=times * p.mean_rms, relative_rms=p.relative_rms / times)
            for p in priors
        ]
        space = search_space(rule, larger)
        eps = space["eps"].start if "eps" in space else None
        steps = [p.rms.double() ** 2 / (1.0 if eps is None else p.rms.double() + eps) for p in larger]
        assert space["lr"].start * sum(float(step.sum()) for step in steps) == pytest.approx(start)
    few = [p._replace(rms=1e-6 * p.rms, mean_rms=1e-6 * p.mean_rms, relative_rms=1e6 * p.relative_rms) for p in priors]
    unit = 1 / few[0].relative_rms
    assert search_space(rule, few)["lr"].start == pytest.approx(1.25e-3 * start / (unit if rule == "sgd" else 1))


@pytest.mark.skipif("DYNLM_TEST_MODEL" not in os.environ, reason="DYNLM_TEST_MODEL is not set")
@pytest.mark.parametrize("rule", ["", *tuned()])
def test_a_real_transformer_gains_at_the_defaults(rule, tmp_path, capsys):
    pairs = permutations(("Quernmoor", "Ellisande", "Haverstock"), 2)
    lines = [f"{a} met {b} in the park. {b} gave {a} a big red ball, and {a} was happy." for a, b in pairs]
    text = tmp_path / "t.txt"
    text.write_text("\n".join(4 * lines) + "\n")
    assert main(["read", str(text), "--model", os.environ["DYNLM_TEST_MODEL"], "--rule", rule, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["totals"]["gain_nats_per_token"] > 1
    assert whole["totals"]["restarts"] == 0
    assert "".join(whole["tokens"]["text"]) == text.read_text()


def test_a_rate_that_is_too_high_is_told(model, text, tmp_path, capsys):
    noise = tmp_path / "noise.txt"  # from which there is nothing to learn
    noise.write_text("".join(random.Random(0).choices(string.ascii_letters + string.digits, k=400)))
    assert (
        main(["read", str(noise), "--model", model, "--quiet", "--prior-text", text, "--rule", "adam", "--lr", "0.3"])
        == 0
    )
    assert "learning lost here: lower --lr (0.3 now)" in capsys.readouterr().err


def test_settings_that_do_not_go_together_are_one_clear_line(model, text, tmp_path, capsys):
    base = ["read", text, "--model", model]
    fails(capsys, ["read", text, "--model", tmp_path / "none"], "holds no model", "save_pretrained")
    fails(capsys, [*base, "--run", tmp_path], "give one of them")
    fails(capsys, [*base, "--rule", "mlp"], "rule mlp without a run", "gated, sgd, rms, adam, static", "(--rule)")
    fails(capsys, [*base, "--lora-rank", "-1"], "--lora-rank is -1")
    fails(capsys, [*base, "--lr", "-1"], "--lr is -1.0")
    fails(capsys, [*base, "--prior-text", tmp_path / "none.txt"], "does not exist")
    fails(capsys, ["read", text, "--lr", "1"], "--lr is for --model")
    fails(capsys, ["read", text, "--lora-rank", "1"], "--lora-rank is for --model")


def test_a_memory_is_read_on_with_what_its_model_carried(model, text, tmp_path, capsys):
    """Keys and values, or the tokens themselves: one is no use to the other."""
    base = ["read", text, "--model", model, "--quiet", "--prior-text", text, "--rule", "sgd", "--lr", "0.01"]
    for carry, other in (("cache", "overlap"), ("overlap", "cache")):
        memory = str(tmp_path / carry)
        assert main([*base, "--carry", carry, "--save-memory", memory]) == 0
        assert main([*base, "--carry", carry, "--load-memory", memory]) == 0
        fails(
            capsys, [*base, "--carry", other, "--load-memory", memory], f"another carry ({carry}, this one is {other})"
        )
