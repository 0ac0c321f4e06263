"""Methods over identical tokens, and the files that hold the result."""

import json

import pytest
import torch

from dynlm.evaluation.compare import describe, summarize, write_results
from dynlm.evaluation.metrics import count
from dynlm.evaluation.stream import Scores, read_articles
from dynlm.files import read_tensors
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.optim.handmade import SGD, Static
from dynlm.optim.library import make_rule
from dynlm.optim.sharing import fingerprint
from dynlm.runs import Run
from dynlm.types import InputError
from lab import START, make_article, make_lab


@pytest.fixture(scope="module")
def reading():
    model, score, priors = make_lab(torch.float32)
    articles = [make_article(200, seed) for seed in range(3)]
    scores = {
        name: read_articles(InnerLoop(model, score, rule, priors, ReadConfig(segment=8)), articles, START)
        for name, rule in {"static": Static(), "sgd": SGD(1.0)}.items()
    }
    return scores, articles


def described(names):
    rules = {"static": Static(), "sgd": SGD(1.0)}
    return {name: describe(name, (rule := rules.get(name, SGD())), rule.settings()) for name in names}


def test_results_hold_every_figure_of_the_schema(reading, tmp_path):
    scores, articles = reading
    counts = count(articles)
    results = summarize(scores, described(scores), counts)
    write_results(Run(tmp_path), scores, articles, {**counts._asdict(), **results})
    saved = json.loads(Run(tmp_path).results.read_text())
    assert saved["schema"] == 2
    assert (saved["articles"], saved["tokens"], saved["words"], saved["bytes"]) == (3, 600, 600, 1800)
    sgd = saved["methods"]["sgd"]
    assert sgd["nats"] == pytest.approx(sum(float(losses_T.double().sum()) for losses_T in scores["sgd"].losses))
    assert sgd["gain_nats_per_token"] == pytest.approx((saved["methods"]["static"]["nats"] - sgd["nats"]) / 600)
    assert sgd["gain_ci95"][0] < sgd["gain_nats_per_token"] < sgd["gain_ci95"][1]
    assert sgd["gain_nats_per_token"] > 0.05
    assert sgd["settings"] == {"lr": 1.0, "decay": 0.0}
    assert (sgd["fingerprint"], saved["methods"]["static"]["fingerprint"]) == (fingerprint(SGD(1.0)), None)
    assert saved["methods"]["static"]["gain_nats_per_token"] == 0
    (comparison,) = saved["comparisons"]
    assert (comparison["better"], comparison["worse"]) == ("sgd", "static")
    assert comparison["p"] == comparison["p_holm"] == 2 / 8  # all three articles gain
    assert comparison["word_ppl_ratio"] == pytest.approx(sgd["word_ppl"] / saved["methods"]["static"]["word_ppl"])


def test_losses_come_back_token_by_token(reading, tmp_path):
    scores, articles = reading
    write_results(Run(tmp_path), scores, articles, {})
    tensors, _ = read_tensors(Run(tmp_path).losses)
    assert torch.equal(tensors["losses/sgd"], torch.cat(scores["sgd"].losses))
    assert tensors["article"].bincount().tolist() == [200, 200, 200]
    assert tensors["position"][200:203].tolist() == [0, 1, 2]
    assert tensors["ids"].dtype == torch.int32
    assert torch.equal(tensors["ids"].long(), torch.cat([article.ids_T for article in articles]))
    assert not any(name.startswith("gates/") for name in tensors)


def test_static_is_required_and_a_nan_never_reaches_the_file(reading, tmp_path):
    scores, articles = reading
    with pytest.raises(InputError, match="lack 'static'"):
        summarize({"sgd": scores["sgd"]}, described(["sgd"]), count(articles))
    write_results(Run(tmp_path), scores, articles, {})
    before = Run(tmp_path).results.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(Run(tmp_path), scores, articles, {"nats": float("nan")})
    assert Run(tmp_path).results.read_text() == before


def test_no_article_is_an_error():
    model, score, priors = make_lab(torch.float32)
    with pytest.raises(InputError, match="no article to read"):
        read_articles(InnerLoop(model, score, Static(), priors), [], START)


def test_scores_sum_in_double_precision():
    scores = Scores([torch.full((1000,), 0.1), torch.ones(3)], 1.0)
    assert scores.nats == pytest.approx(1000 * float(torch.tensor(0.1)) + 3, rel=1e-12)


def test_seeds_of_a_rule_are_summed_up(reading):
    scores, articles = reading
    worse = scores["sgd"]._replace(losses=[losses_T + 0.01 for losses_T in scores["sgd"].losses])
    several = {**scores, "gated": scores["sgd"], "gated#1": worse, "gated+cache": worse}
    seeds = summarize(several, described(several), count(articles))["seeds"]
    assert list(seeds) == ["gated"]
    assert seeds["gated"]["methods"] == ["gated", "gated#1"]
    gains = [
        float((a - b).mean()) for a, b in [(scores["static"].losses[0], s.losses[0]) for s in (scores["sgd"], worse)]
    ]
    assert gains[0] - gains[1] == pytest.approx(0.01, abs=1e-5)
    assert seeds["gated"]["gain_nats_per_token"]["sd"] == pytest.approx(0.01 / 2**0.5, rel=1e-3)
    assert summarize(scores, described(scores), count(articles))["seeds"] == {}


@pytest.mark.parametrize(
    ("name", "rule", "expected"),
    [
        ("static", "static", ("static", "baseline", 0, None, False)),
        ("cache", "static", ("static", "hand-made", 0, None, True)),
        ("rms+cache", "rms", ("rms", "hand-made", 0, None, True)),
        ("rms@fomaml", "rms", ("rms", "hand-made", 0, "fomaml", False)),
        ("static@fomaml", "static", ("static", "baseline", 0, "fomaml", False)),
        ("gated#12@maml+cache", "gated", ("gated", "learned", 12, "maml", True)),
        ("linear", "linear", ("linear", "learned", 0, None, False)),
        ("stateless", "static", ("stateless", "baseline", 0, None, False)),
        ("mine", "gated", ("gated", "learned", 0, None, False)),
    ],
)
def test_results_say_what_a_method_is(name, rule, expected):
    found = describe(name, make_rule(rule), {"lr": 2.0})
    assert tuple(found[key] for key in ("rule", "kind", "seed", "start", "cache")) == expected
    assert found["settings"] == {"lr": 2.0}
