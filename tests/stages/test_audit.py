"""`dynlm audit`, tuned caches and breakdowns on a real run."""

import json
import re

import pytest
import torch

import dynlm
from dynlm.cli.main import main
from dynlm.data.tokenizers import load_tokenizer
from dynlm.files import read_tensors, write_tensors
from dynlm.models.core import LSTMScorer
from dynlm.optim.library import load_rule
from dynlm.optim.sharing import save_rule
from dynlm.runs import Run
from dynlm.session.session import load_session
from dynlm.stamps import fingerprint_files
from support.commands import fails

TEXT = "The module defines the following classes and functions for the file. The file is closed by the module. " * 8
pytestmark = pytest.mark.usefixtures("plain_reports")


def test_a_sound_run_passes_and_nothing_is_written(copy, capsys):
    recipe, run = copy
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert main(["audit", str(recipe), "--run", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any("FAILED" in line for line in lines)
    assert sum("causality  " in line for line in lines) == 4  # the methods of results.json
    assert any("words and bytes add up" in line and "3 articles" in line for line in lines)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_leak_is_named_and_ends_in_code_2(copy, capsys, monkeypatch):
    _, run = copy
    honest = LSTMScorer.__call__

    def peeking(self, inputs_S, targets_S, hidden):
        losses_S, hidden = honest(self, inputs_S, targets_S, hidden)
        return losses_S + 1e-3 * (targets_S.roll(-1) % 7), hidden

    monkeypatch.setattr(LSTMScorer, "__call__", peeking)
    Run(run).results.unlink()
    assert main(["audit", "--run", str(run), "--evaluate.methods", "static", "rms"]) == 2
    captured = capsys.readouterr()
    assert captured.err.strip().endswith("failed: its figures cannot be trusted")
    failing = [line for line in captured.out.splitlines() if "FAILED" in line]
    assert sum("causality  " in line for line in failing) == 2
    assert "moves with the tokens from" in captured.out


def test_caches_are_tuned_and_read_beside_rules(copy, capsys):
    recipe, run = copy
    base = [str(recipe), "--run", str(run)]
    wanted = ["--evaluate.methods", "static", "cache", "rms", "rms+cache"]
    assert main(["evaluate", *base, "--overwrite", *wanted]) == 2
    assert "run `dynlm tune --tune.rules cache`" in capsys.readouterr().err
    assert main(["tune", *base, "--tune.rules", "cache", "rms+cache"]) == 0
    assert main(["tune", *base, "--tune.rules", "cache"]) == 2
    assert main(["evaluate", *base, "--overwrite", *wanted]) == 0
    results = json.loads(Run(run).results.read_text())
    assert set(results["methods"]) == {"static", "cache", "rms", "rms+cache"}
    assert results["methods"]["cache"]["nats"] < results["methods"]["static"]["nats"]
    settings = results["methods"]["rms+cache"]["settings"]
    assert {"lr", "eps", "decay", "cache.weight", "cache.theta", "cache.window"} == set(settings)
    found = results["breakdowns"]
    assert set(found) == {"relative_position", "occurrence", "train_frequency", "vocabulary", "calibration", "gates"}
    assert set(found["gates"]) == {"rms"}  # beside a cache the rule does what it does alone
    assert sum(row["tokens"] for row in found["relative_position"]) == results["tokens"]
    assert set(found["calibration"]) == set(results["methods"])
    assert all(0 < row["p"] <= row["p_holm"] <= 1 for row in results["comparisons"])
    assert "rms+cache" in Run(run).report.read_text()
    assert main(["audit", *base, "--audit.quick"]) == 0
    tensors, _ = read_tensors(Run(run).losses)
    assert tensors["losses/rms+cache"].isfinite().all()
    assert [name for name in tensors if name.startswith("gates/")] == ["gates/rms"]


def test_a_stream_tells_of_boundaries_and_interference(copy):
    _, run = copy
    arguments = ["--run", str(run), "--overwrite", "--read.reset", "never", "--evaluate.methods", "static", "rms"]
    assert main(["evaluate", *arguments]) == 0
    found = json.loads(Run(run).results.read_text())["breakdowns"]
    assert set(found["boundaries"]["recovery_segments"]) == {"static", "rms"}
    assert set(found["interference"]["methods"]) == {"rms"}


def test_what_is_known_without_any_memory_and_what_the_figures_belong_to(copy, capsys):
    _, run = copy
    wanted = ["--evaluate.methods", "static", "stateless", "gated", "--evaluate.gate_articles", "2"]
    assert main(["evaluate", "--run", str(run), "--overwrite", *wanted]) == 0
    results, tensors = json.loads(Run(run).results.read_text()), read_tensors(Run(run).losses)[0]
    session = load_session(str(run))
    kit = session.fingerprints(session.rule("gated"))
    methods = results["methods"]
    assert results["model"]["fingerprint"] == kit["model"]
    assert {name: method["fingerprint"] for name, method in methods.items()} == {
        "static": None, "stateless": None, "gated": kit["rule"],
    }  # fmt: skip
    tokenizer = {"class": "SentencePieceTokenizer", "vocab_size": 400}
    assert results["tokenizer"] == {**tokenizer, "fingerprint": fingerprint_files(Run(run).tokenizer)}
    first_S = slice(0, results["segment"])
    assert torch.equal(tensors["losses/static"][first_S], tensors["losses/stateless"][first_S])
    assert methods["stateless"]["nats"] != methods["static"]["nats"]
    article = load_tokenizer(Run(run).tokenizer).decode(tensors["ids"][tensors["article"] == 0].tolist())
    assert results["data"]["titles"][0] in article
    lengths = tensors["article"].bincount().tolist()[:2]
    gated = results["breakdowns"]["gates"]["gated"]
    assert gated["segments"] == [(n - 1) // results["segment"] for n in lengths]
    assert tensors["gates/gated"].shape == (3, sum(gated["segments"]), len(gated["tensors"]))
    assert sum(gated["weights"]) == results["model"]["adapted"]
    capsys.readouterr()
    assert main(["audit", "--run", str(run), "--audit.quick"]) == 0
    assert sum("stateless" in line for line in capsys.readouterr().out.splitlines()) == 10


def test_mixtures_are_fitted_on_the_meta_split_and_read_beside_rules(copy, capsys):
    recipe, run = copy
    base = [str(recipe), "--run", str(run)]
    fitted = ["cache", "rms+cache", "rms+mix", "rms+cache+mix", "cache+mix"]
    assert main(["tune", *base, "--tune.rules", "static+mix"]) == 2
    assert "there is nothing to mix" in capsys.readouterr().err
    assert main(["tune", *base, "--tune.articles", "4", "--tune.rules", *fitted]) == 0
    assert "rms+cache+mix: " in (told := capsys.readouterr().out)
    assert re.search(r"rms\+cache\+mix: \d\.\d{4} nats/token held out, \d\.\d{4} with weights (0\.\d+(, )?){3}\n", told)
    assert main(["evaluate", *base, "--overwrite", "--evaluate.methods", "static", "rms", *fitted]) == 0
    methods = json.loads(Run(run).results.read_text())["methods"]
    assert methods["rms+cache+mix"]["kind"] == "learned"
    assert {name for name, method in methods.items() if method["mix"]} == set(fitted[2:])
    assert methods["rms+mix"]["nats"] < methods["static"]["nats"]
    assert methods["rms+cache+mix"]["settings"].keys() >= {"lr", "cache.theta"}
    assert "cache.theta" not in methods["rms+mix"]["settings"]
    assert "rms+cache+mix" in Run(run).report.read_text()
    assert main(["audit", *base, "--audit.quick"]) == 0
    for name in ("rms+cache", "rms+mix", "rms+cache+mix"):
        reads_texts_as_articles(run, name)


def reads_texts_as_articles(run, name):
    """A text gives the losses that it gives as an article, and the distributions that they are of."""
    reader = dynlm.Reader.from_pretrained(str(run), rule=name)
    article = dynlm.Article("a", "A", TEXT)
    losses = [(step.log_probs(), step.targets, step.losses) for step in reader.steps(article)]
    for log_probs_SV, targets_S, losses_S in losses:
        torch.testing.assert_close(log_probs_SV.exp().sum(1), torch.ones(len(targets_S)))
        expected_S = -log_probs_SV.gather(1, targets_S[:, None])[:, 0].double()
        torch.testing.assert_close(losses_S, expected_S, rtol=1e-5, atol=1e-5)
    nats = sum(float(losses_S.sum()) for *_, losses_S in losses)
    inner, (tokens,) = reader.session.method(name), reader.session.tokenize([article])
    with inner:
        assert nats == pytest.approx(float(inner.read(tokens, reader.session.tokenizer.start_id).sum()), rel=1e-6)
    assert dynlm.evaluate(reader, [article])[name]["nats"] == pytest.approx(nats, rel=1e-6)
    with pytest.raises(dynlm.InputError, match=f"no cache or mixture: read with 'rms', not '{re.escape(name)}'"):
        reader.save_memory(run / "memory")


def test_a_rule_in_the_place_of_a_cache_is_told_apart(copy, capsys):
    _, run = copy
    rule, made = load_rule(Run(run).rule("rms"))
    save_rule(rule, Run(run).rule("cache"), made)
    base = ["evaluate", "--run", str(run), "--overwrite", "--evaluate.methods", "static", "cache"]
    assert main(base) == 2
    assert "holds no settings of a cache" in capsys.readouterr().err
    tensors = {name: torch.tensor(9.0) for name in ("weight", "theta", "window")}
    write_tensors(Run(run).rule("cache"), tensors, {"kind": "cache"})
    assert main(base) == 2
    assert "weight is 9.0: exp" in capsys.readouterr().err


def test_a_run_is_evaluated_on_any_text(copy, tmp_path, capsys):
    """All of a source without splits is read; what training fixed stays, and the run's own texts need not be there."""
    _, run = copy
    lines = [
        {"title": name, "text": f"The {name} saw the cat.\nThe cat saw the {name}.\n" * 6} for name in ("dog", "owl")
    ]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["evaluate", "--run", str(run), "--overwrite", "--evaluate.methods", "static", "rms"]
    assert main([*command, "--data.source", str(other)]) == 0
    results = json.loads(Run(run).results.read_text())
    assert results["data"]["titles"] == ["dog", "owl"]
    assert results["data"]["source"] == str(other)
    assert results["methods"]["rms"]["gain_nats_per_token"] > 0
    assert "train_frequency" in results["breakdowns"]
    theirs = dynlm.evaluate(
        str(run), [dynlm.Article(x["title"], x["title"], x["text"]) for x in lines], ["static", "rms"]
    )
    for name in ("static", "rms"):
        assert theirs[name]["nats"] == pytest.approx(results["methods"][name]["nats"], rel=1e-6)
    capsys.readouterr()
    assert main(["audit", "--run", str(run), "--quick", "--data.source", str(other), "--evaluate.methods", "rms"]) == 0
    assert "dog" not in capsys.readouterr().err
    fails(capsys, ["tune", "--run", run, "--overwrite", "--data.source", other], "data.source is", "use another --run")
    fails(capsys, [*command, "--data.source", tmp_path / "none.txt"], "none.txt")
