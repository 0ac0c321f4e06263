"""lm-eval reads a model's folder without glue, and as a model that learns while it reads."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from dynlm.data.tokenizers import tokenize
from dynlm.session.session import DEFAULT_MODEL, SHIPPED, load_session
from dynlm.types import Article, InputError

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install dynlm[lm-eval]")
pytestmark = pytest.mark.filterwarnings("ignore")  # they are lm-eval's and its libraries'

LINES = [f" The red cat number {n} sat on the mat , and the <unk> cat liked mat {n * n} @.@ 5 . \n" for n in range(40)]
TEXT = " = Cats = \n \n" + "".join(LINES)
CONTEXT, CONTINUATION = TEXT[:700], TEXT[700:760]
TASK = """
task: cats
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def hf():
    """lm-eval's own model; the window is longer than every text."""
    from lm_eval.models.huggingface import HFLM

    import dynlm.models.lstm  # noqa: F401  (or trust_remote_code=True)

    folder = str(SHIPPED / DEFAULT_MODEL / "model")
    return HFLM(pretrained=folder, device="cpu", batch_size=2, max_length=100_000)


@pytest.fixture(scope="module")
def models():
    from dynlm.lm_eval import DynamicLM

    return {rule: DynamicLM(rule=rule) for rule in ("static", "rms", "gated")}


def asked(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def own_nats(rule, text):
    """What dynlm's reader says, with the light LSTM."""
    kit = load_session(light=True)
    reader = kit.reader(kit.rule(rule))
    with reader:
        return float(reader.read(tokenize(kit.tokenizer, [Article("a", "", text)])[0], kit.tokenizer.start_id).sum())


def test_static_perplexity_is_that_of_lm_eval(hf, models):
    wish = asked("loglikelihood_rolling", (TEXT,), ("one line\n",))
    expected = [own_nats("static", TEXT), own_nats("static", "one line\n")]
    assert hf.loglikelihood_rolling(wish) == pytest.approx([-nats for nats in expected], rel=1e-6)
    assert models["static"].loglikelihood_rolling(wish) == pytest.approx([-nats for nats in expected], rel=1e-6)


@pytest.mark.parametrize("rule", ["rms", "gated"])
def test_every_document_is_read_from_the_trained_weights(models, rule):
    """Whatever came before it, and with the gain of the reader itself."""
    found = models[rule].loglikelihood_rolling(asked("loglikelihood_rolling", (TEXT,), (CONTEXT,), (TEXT,)))
    assert found[0] == found[2]
    assert found[0] == pytest.approx(-own_nats(rule, TEXT), rel=1e-6)
    assert found[0] > 0.9 * models["static"].loglikelihood_rolling(asked("loglikelihood_rolling", (TEXT,)))[0]
    weights = dict(models[rule].reader.model.named_parameters())
    for prior in models[rule].reader.priors:
        assert torch.equal(weights[prior.name].detach().view_as(prior.theta0), prior.theta0), prior.name


def test_continuations_are_scored_as_lm_eval_does_and_profit_from_their_context(hf, models):
    wish = asked("loglikelihood", (CONTEXT, CONTINUATION), (CONTEXT, " mat"), ("", TEXT), (" The cat", " "), ("a", ""))
    expected, static = hf.loglikelihood(wish[:4]), models["static"].loglikelihood(wish)
    for (nats, greedy), (found, likeliest) in zip(expected, static[:4], strict=True):
        assert found == pytest.approx(nats, rel=1e-5)
        assert likeliest == greedy
    assert static[4] == (0.0, True)
    adapted = models["rms"].loglikelihood(wish)
    assert adapted[0][0] > static[0][0] + 5
    assert adapted[3] == pytest.approx(static[3])  # shorter than a segment: nothing was learned
    assert adapted[2][0] == pytest.approx(-own_nats("rms", TEXT), rel=1e-6)


def test_it_tells_whether_a_continuation_is_the_likeliest(models):
    context = TEXT[:1500]
    for rule, model in models.items():
        (written,) = model.generate_until(asked("generate_until", (context, {"max_gen_toks": 1})))
        if rule == "static":  # what is learned from the last, unfinished segment of a context helps writing alone
            (found,) = model.loglikelihood(asked("loglikelihood", (context, written)))
            assert found[1] is True
        (other,) = model.loglikelihood(asked("loglikelihood", (context, " zinc")))
        assert other[1] is False


def test_it_writes_what_the_adapted_weights_say(hf, models):
    context = TEXT[: TEXT.rindex(" , and")]
    wish = asked("generate_until", (context, {"until": [" ."], "max_gen_toks": 12}), (" The", {"max_gen_toks": 5}))
    expected = hf.generate_until(wish)
    assert models["static"].generate_until(wish) == expected
    assert models["static"].generate_until(asked("generate_until", ("", {"max_gen_toks": 3})))[0]
    adapted = models["rms"].generate_until(wish)
    assert "cat liked mat" in adapted[0]
    assert "cat liked mat" not in expected[0]
    assert " ." not in adapted[0]
    with pytest.raises(InputError, match="set do_sample to false"):
        models["static"].generate_until(asked("generate_until", (context, {"do_sample": True, "temperature": 0.7})))


def test_a_rule_that_the_run_does_not_hold_is_one_line():
    from dynlm.lm_eval import DynamicLM

    with pytest.raises(InputError, match="has no rule 'adam'"):
        DynamicLM.create_from_arg_string("rule=adam")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["hf", "dynlm"])
def test_the_command_line_evaluates_both(tmp_path, model):
    (tmp_path / "cats.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (tmp_path / "cats.yaml").write_text(TASK.replace("FILE", str(tmp_path / "cats.jsonl")))
    folder = SHIPPED / DEFAULT_MODEL / "model"
    chosen = {"hf": f"pretrained={folder},trust_remote_code=True,max_length=100000", "dynlm": "rule=static"}[model]
    module = {"hf": "lm_eval", "dynlm": "dynlm.lm_eval"}[model]  # the first knows nothing of dynlm
    command = [sys.executable, "-W", "ignore", "-m", module, "--model", model, "--model_args", chosen]
    places = {"HF_DATASETS_CACHE": tmp_path / "data", "HF_MODULES_CACHE": tmp_path / "modules", "HF_HUB_OFFLINE": 1}
    ended = subprocess.run(
        [*command, "--tasks", "cats", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")],
        env=os.environ | {name: str(value) for name, value in places.items()},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["cats"]["word_perplexity,none"]
    words = len(re.split(r"\s+", TEXT))  # as lm-eval counts them
    assert found == pytest.approx(float(torch.tensor(own_nats("static", TEXT) / words).exp()), rel=2e-5)
