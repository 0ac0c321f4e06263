"""Any causal language model of transformers as a scorer: what it carries, and what reading may and may not change."""

import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

from dynlm.evaluation.audit import first_leak, restores
from dynlm.meta.positions import pack, unpack
from dynlm.meta.unroll import Unroll, UnrollConfig
from dynlm.models.causal import CausalScorer, load_model, scorer_for
from dynlm.models.context import ContextConfig
from dynlm.models.core import LSTMScorer
from dynlm.models.lora import LoraSettings, add_lora
from dynlm.models.params import adapted_parameters
from dynlm.optim.gated import Gated
from dynlm.optim.handmade import RMS, SGD, Static
from dynlm.types import InputError
from lab import START, VOCAB, make_article
from support.causal import (
    GPT2,
    LAYERS,
    MAMBA,
    POSITIONS,
    ROPE,
    SEGMENT,
    make_model,
    make_scorer,
    pieces_of,
    priors_for,
    reader_for,
)

SETTINGS = {"lr": 3e-3, "eps": 1e-3, "decay": 1e-2}
FIVE = ["lstm", "gpt2", "llama", "qwen3", "mamba"]
CARRIES = [("lstm", "cache"), *((name, c) for name in FIVE[1:] for c in ("overlap", "cache"))]
CARRIES += [("gpt2", "none"), ("mamba", "none")]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def make_rules(priors):
    return {"sgd": SGD(0.1), "rms": RMS(**SETTINGS), "gated": Gated.started_at(SETTINGS, priors)}


def static_losses(score, article, segment=SEGMENT):
    """(losses, hidden states between segments) under the trained weights."""
    losses, states = [], [None]
    with torch.no_grad():
        for piece in pieces_of(article, segment):
            losses_S, hidden = score(*piece, states[-1])
            losses.append(losses_S)
            states.append(hidden)
    return torch.cat(losses), states


def one_pass(model, inputs_T, targets_T):
    with torch.no_grad():
        return F.cross_entropy(model(inputs_T[None]).logits[0], targets_T, reduction="none")


@pytest.mark.parametrize(("name", "carry"), CARRIES)
def test_every_rule_scores_each_token_once_and_leaves_theta0(name, carry):
    score, article = make_scorer(name, carry), make_article(44)
    priors = priors_for(score)
    static = reader_for(score, Static(), priors).read(article, START)
    torch.testing.assert_close(static, static_losses(score, article)[0], rtol=0, atol=0)
    scored = []

    def noting(inputs_S, targets_S, hidden):
        scored.append((inputs_S, targets_S))
        return score(inputs_S, targets_S, hidden)

    for rule in make_rules(priors).values():
        scored.clear()
        reader = reader_for(score, rule, priors)
        reader.score = noting
        assert restores(reader, article, START)
        inputs_T, targets_T = (torch.cat(part) for part in zip(*scored, strict=True))
        assert torch.equal(targets_T, article.ids_T)
        assert torch.equal(inputs_T, torch.cat([torch.tensor([START]), article.ids_T[:-1]]))
        with reader:
            losses_T = reader.read(article, START)
        assert torch.equal(losses_T[:SEGMENT], static[:SEGMENT])
        assert not torch.equal(losses_T[SEGMENT:], static[SEGMENT:])


@pytest.mark.parametrize(("name", "carry"), CARRIES)
def test_scores_do_not_move_when_later_tokens_change(name, carry):
    score = make_scorer(name, carry, window=0 if name == "mamba" else 20)  # 20: full again and again
    priors = priors_for(score)
    for position, rule in zip((5, 16, 35), make_rules(priors).values(), strict=True):
        assert first_leak(reader_for(score, rule, priors), make_article(40), START, position, VOCAB) is None


@pytest.mark.parametrize("name", FIVE)
def test_theta0_is_back_after_an_exception(name):
    score = make_scorer(name, "cache")
    saved = [p.clone() for p in score.model.parameters()]

    def interrupted():
        with reader_for(score, SGD(0.1), priors_for(score)) as reader:
            reader.segment(*pieces_of(make_article(8))[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(a, b) for a, b in zip(saved, score.model.parameters(), strict=True))


@pytest.mark.parametrize("name", [*FIVE[1:], "mistral"])
@pytest.mark.parametrize("segment", [1, 7, 30])
def test_overlap_cache_and_one_pass_agree_without_learning(name, segment):
    article = make_article(30)
    inputs_T = torch.cat([torch.tensor([START]), article.ids_T[:-1]])
    expected = one_pass(make_model(name), inputs_T, article.ids_T)
    for carry in ("overlap", "cache"):
        losses, _ = static_losses(make_scorer(name, carry, window=30), article, segment)
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    alone, _ = static_losses(make_scorer(name, "none"), article, segment)
    cuts = [one_pass(make_model(name), *piece) for piece in pieces_of(article, segment)]
    torch.testing.assert_close(alone, torch.cat(cuts), rtol=0, atol=1e-4)


def starts_with_window(carry, window, n_tokens):
    """Where the text that each segment sees begins: the oracle of a window that is full."""
    starts, start = [], 0
    for at in range(0, n_tokens, SEGMENT):
        size = min(SEGMENT, n_tokens - at)
        if carry == "overlap":
            start = max(0, at + size - window)
        elif at + size - start > window:
            start = at - min(window // 2, window - size)
        starts.append(start)
    return starts


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "mamba"])
@pytest.mark.parametrize("window", [8, 20, 0])
def test_a_full_window_sees_what_it_says_and_runs_past_the_positions(name, window):
    article, model = make_article(100), make_model(name)
    inputs_T = torch.cat([torch.tensor([START]), article.ids_T[:-1]])
    for carry in ("overlap", "cache"):
        size = window or (256 if name == "mamba" else POSITIONS)
        starts = [0] * 13 if (name, carry) == ("mamba", "cache") else starts_with_window(carry, size, 100)
        expected = []
        for start, at in zip(starts, range(0, 100, SEGMENT), strict=True):
            end = min(at + SEGMENT, 100)
            expected.append(one_pass(model, inputs_T[start:end], article.ids_T[start:end])[at - start :])
        losses, _ = static_losses(CausalScorer(model, ContextConfig(carry, window)), article)
        torch.testing.assert_close(losses, torch.cat(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "carry"), [(n, c) for n in ("gpt2", "llama", "mamba") for c in ("overlap", "cache")])
def test_the_gradient_is_that_of_the_present_weights_at_a_fixed_hidden_state(name, carry):
    score, (first, second, *_) = make_scorer(name, carry), pieces_of(make_article(24))
    hidden = score(*first, None)[1]
    parameters = list(score.model.parameters())
    grads = torch.autograd.grad(score(*second, hidden)[0].mean(), parameters)
    saved, step = [p.detach().clone() for p in parameters], 1e-3
    means = []
    with torch.no_grad():
        for sign in (1, -1):
            for p, theta0, g in zip(parameters, saved, grads, strict=True):
                p.copy_(theta0 + sign * step * g)
            means.append(float(score(*second, hidden)[0].double().mean()))
    slope = float(sum(g.double().square().sum() for g in grads))
    assert (means[0] - means[1]) / (2 * step) == pytest.approx(slope, rel=1e-2)


def test_gradients_flow_through_the_context_of_an_overlap_only():
    reached = {}
    for carry in ("overlap", "cache"):
        score, ids = make_scorer("llama", carry), torch.arange(1, 17)
        _, hidden = score(ids[:8], ids[1:9], None)
        loss = score(ids[8:15], ids[9:16], hidden)[0].mean()
        (grad,) = torch.autograd.grad(loss, score.model.get_input_embeddings().weight)
        reached[carry] = bool(grad[1:8].abs().max() > 0), bool(grad[8:15].abs().max() > 0)
    assert reached == {"overlap": (True, True), "cache": (False, True)}


@pytest.mark.parametrize(("name", "carry"), [*CARRIES, ("mistral", "cache")])
def test_a_snapshot_and_a_checkpoint_go_on_exactly(name, carry):
    score = make_scorer(name, carry, window=0 if name == "mamba" else 20)
    pieces, priors = pieces_of(make_article(64)), priors_for(score)
    with reader_for(score, RMS(**SETTINGS), priors) as reader:
        for piece in pieces[:3]:
            reader.segment(*piece)
        tensors = {}
        packed = pack(reader.snapshot(), "position", tensors)
        tensors = {key: t.clone() for key, t in tensors.items()}
        saved = reader.snapshot()
        straight = [reader.segment(*piece).losses_S for piece in pieces[3:]]
        for position in (saved, unpack(packed, tensors, torch.device("cpu"))):
            reader.resume(position)
            again = [reader.segment(*piece).losses_S for piece in pieces[3:]]
            assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_an_unroll_in_slices_meets_the_same_caches(name):
    score, pieces = make_scorer(name, "cache"), pieces_of(make_article(32))
    priors, grads = priors_for(score), []
    for slices in ((), (2,)):
        rule = RMS(**SETTINGS)
        with reader_for(score, rule, priors) as reader:
            unroll = Unroll(score, rule, reader.adapted, priors, UnrollConfig(2, slices))
            unroll.run(reader.snapshot(), pieces, [1.0] * len(pieces)).loss.backward()
        grads.append([p.grad.clone() for p in rule.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_tied_embeddings_count_once_and_move_together(name):
    score = make_scorer(name)
    model, priors = score.model, priors_for(score)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert sum(p.theta0.numel() for p in priors) == model.num_parameters()
    reader = reader_for(score, SGD(0.1), priors)
    reader.begin()
    reader.segment(*pieces_of(make_article(8))[0])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not torch.equal(model.lm_head.weight, priors[0].theta0)


@pytest.mark.parametrize("window", [POSITIONS + 1, -1])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_window_beyond_the_positions_is_one_clear_line(name, window):
    with pytest.raises(InputError, match=rf"window is {window}.*: (lower it to 64|expected a whole number from 0)"):
        make_scorer(name, "cache", window)


@pytest.mark.parametrize(("carry", "window"), [("overlap", 7), ("cache", 7), ("none", 7)])
def test_a_segment_longer_than_the_window_is_one_clear_line(carry, window):
    score = make_scorer("gpt2", carry, window)
    with pytest.raises(InputError, match=r"a segment of 8 tokens does not fit into 7 of context .* shorten"):
        static_losses(score, make_article(8))


def test_models_that_cannot_be_read_are_one_clear_line():
    tiny = BertConfig(vocab_size=VOCAB, **LAYERS, initializer_range=0.2)
    with pytest.raises(InputError, match="BertLMHeadModel sees later tokens"):
        CausalScorer(BertLMHeadModel(tiny))
    stateless = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(InputError, match=r"OpenAIGPTLMHeadModel .* set carry to 'overlap'"):
        CausalScorer(stateless, ContextConfig("cache"))
    assert stateless.training


def test_half_precision_is_scored_in_float32():
    model = make_model("llama").bfloat16()
    losses, _ = static_losses(CausalScorer(model, ContextConfig("cache")), make_article(20))
    assert losses.dtype == torch.float32


TARGETS = {"gpt2": "*.c_attn", "llama": "*.self_attn.[qv]_proj", "mamba": "*.in_proj"}
WIDE = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**{**GPT2, "n_embd": 96})),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**ROPE, "hidden_size": 96, "intermediate_size": 200})),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**{**MAMBA, "hidden_size": 96})),
}


@pytest.mark.parametrize("name", list(WIDE))
def test_low_rank_weights_read_alone_and_are_put_back(name):
    torch.manual_seed(1)
    model, article = WIDE[name]().eval(), make_article(44)
    before, _ = static_losses(CausalScorer(model), article)
    globs = add_lora(model, LoraSettings(rank=2, alpha=4.0, targets=(TARGETS[name],)))
    base = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    score = CausalScorer(model)
    torch.testing.assert_close(static_losses(score, article)[0], before, rtol=1e-6, atol=1e-6)  # B = 0
    priors = priors_for(score, globs)
    assert sum(p.theta0.numel() for p in priors) < 0.02 * model.num_parameters()
    assert all(p.rms.min() >= 0 and p.mean_rms > 0 for p in priors)  # A has no gradient yet, rules divide by its RMS
    for rule in make_rules(priors).values():
        reader = reader_for(score, rule, priors, params=globs)
        assert restores(reader, article, START)
        for piece in pieces_of(article)[:3]:
            reader.segment(*piece)
        assert all(not torch.equal(t, p.theta0) for t, p in zip(reader.thetas, priors, strict=True))
        reader.restore()
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_low_rank_settings_that_cannot_be_are_one_clear_line(monkeypatch):
    model = make_model("gpt2")
    with pytest.raises(InputError, match=r"the rank is 0: expected 1 or more"):
        add_lora(model, LoraSettings(rank=0))
    with pytest.raises(InputError, match=r"'\*\.c_atn' matches no linear layer .* did you mean '.*c_attn'"):
        add_lora(model, LoraSettings(targets=("*.c_atn",)))
    with pytest.raises(InputError, match="no linear layer beside its head"):
        add_lora(make_model("lstm"))
    with pytest.raises(InputError, match="peft refuses"):
        add_lora(make_model("mamba"))  # its kernels read out_proj's weight past the layer
    add_lora(model)
    with pytest.raises(InputError, match="has low-rank weights already"):
        add_lora(model)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"install \"dynlm\[lora\]\""):
        add_lora(make_model("llama"))


def test_a_folder_of_any_causal_model_loads_and_gets_its_scorer(tmp_path):
    model = make_model("qwen3").bfloat16()
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert again.dtype == torch.float32
    assert load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.float())
    assert isinstance(scorer_for(again), CausalScorer)
    assert isinstance(scorer_for(make_model("lstm")), LSTMScorer)


def test_a_model_that_lacks_weights_is_one_clear_line(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"is not a whole model \(it lacks model.norm.weight\)"):
        load_model(tmp_path)


@pytest.mark.filterwarnings("ignore:Casting complex values")  # the loader's, before ours
@pytest.mark.parametrize(("dtype", "shown"), [(torch.bool, "BOOL"), (torch.int32, "I32"), (torch.complex64, "C64")])
def test_weights_that_are_no_real_numbers_are_refused(tmp_path, dtype, shown):
    make_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(dtype)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"'model.norm.weight' is {shown}, expected floating point"):
        load_model(tmp_path)


def test_a_hub_model_is_not_fetched_unasked(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"nobody/nothing is no folder, and no hub model .* is on this machine"):
        load_model("nobody/nothing")


def test_adapted_parameters_of_low_rank_weights_are_named():
    model = make_model("gpt2")
    names = [a.name for a in adapted_parameters(model, add_lora(model))]
    assert len(names) == 2 * 2 * 4  # A and B of four layers in two blocks
    assert all("lora_" in name and "lm_head" not in name for name in names)
