"""Plans: what is predicted is what is then taken, and what does not fit is refused with what would."""

import json
import subprocess
import sys

import pytest

from dynlm.allocator import MIB
from dynlm.inner import InnerLoop, ReadConfig
from dynlm.meta.estimators import EstimatorConfig, make_estimator
from dynlm.meta.plan import Plan, plan_step, require_fit
from dynlm.types import InputError
from lab import make_lab
from support.rules import make
from support.windows import SEGMENT, pieces_of

MEASURE = """
import json, sys
import torch
from dynlm.inner import InnerLoop
from dynlm.priors import measure_priors
from dynlm.data.segments import article_segments
from dynlm.meta.estimators import EstimatorConfig, make_estimator
from dynlm.meta.plan import peak_memory, plan_step, run_window
from dynlm.models.core import LSTMScorer
from dynlm.models.lstm import ModelConfig
from dynlm.optim.library import start_rule

kind, window = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
model = ModelConfig().build(2048, 0, 0).eval()
score = LSTMScorer(model)
ids_T = torch.randint(1, 2048, (window * 4,), generator=torch.Generator().manual_seed(0))
pieces = list(article_segments(ids_T, 0, 4))
priors = measure_priors(model, score, iter(pieces[:2]))
rule = start_rule("gated", {"lr": 1e-4, "eps": 5e-4, "decay": 1e-3}, priors)
estimator = make_estimator(InnerLoop(model, score, rule, priors), EstimatorConfig(kind, memory=400))
plan = plan_step(estimator, pieces, window)
run_window(estimator, pieces)
print(json.dumps([plan.peak, peak_memory(), plan.note]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "window"), [("replay", 256), ("unroll", 16)])
def test_the_predicted_peak_is_the_measured_one(kind, window):
    """In a process of its own, as the peak is the process's. 1.05M weights; windows that outgrow the probe by far."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, kind, str(window)], capture_output=True, text=True, check=True
    )
    predicted, measured, note = json.loads(done.stdout.splitlines()[-1])
    assert predicted == pytest.approx(measured, rel=0.15), (predicted / MIB, measured / MIB, note)


@pytest.mark.parametrize("kind", ["replay", "unroll", "forward", "pes"])
def test_every_estimator_has_a_plan(lab, kind):
    model, score, priors = lab
    rule = make("rms", priors)
    with InnerLoop(model, score, rule, priors, ReadConfig(segment=SEGMENT, kernel="eager")) as reader:
        estimator = make_estimator(reader, EstimatorConfig(kind))
        short, long = (plan_step(estimator, pieces_of(40), window) for window in (8, 8000))
        constant = estimator.footprint(8) == estimator.footprint(8000)
    assert constant == (kind in ("forward", "pes"))
    assert long.seconds > 50 * short.seconds
    assert all(p.grad is None for p in rule.parameters())


def test_an_unroll_that_does_not_fit_is_told_its_slices(lab, monkeypatch):
    monkeypatch.setattr("dynlm.meta.unroll.NODE_BYTES", 0)  # with weights so few, slices could not save anything else
    model, score, priors = lab
    rule = make("gated", priors)
    with InnerLoop(model, score, rule, priors, ReadConfig(segment=SEGMENT, kernel="eager")) as reader:
        estimator = make_estimator(reader, EstimatorConfig("unroll", slices=(512,)))
        plan = plan_step(estimator, pieces_of(40), 512)
        whole = estimator.footprint(512)
        with pytest.raises(InputError, match=r"slices of \d+( and \d+)* segments fit") as raised:
            require_fit(plan, plan.peak - whole // 2, estimator, 512)
        assert raised.value.setting == "meta.estimator.slices"


def test_what_does_not_fit_is_refused_with_what_would():
    lab = make_lab()
    model, score, priors = lab
    rule = make("gated", priors)
    with InnerLoop(model, score, rule, priors, ReadConfig(segment=SEGMENT, kernel="eager")) as reader:
        estimator, window = make_estimator(reader, EstimatorConfig("replay")), 512
        needed = estimator.footprint(window)
        base = 100 * MIB
        plan = Plan(base + needed, 1.0, "")
        require_fit(plan, plan.peak, estimator, window)
        with pytest.raises(InputError, match=r"a meta-step over 512 segments peaks at .* windows of 256 segments fit"):
            require_fit(plan, base + needed * 6 // 10, estimator, window)
        with pytest.raises(InputError, match="even a window of"):
            require_fit(plan, base // 2, estimator, window)
