"""The library's front door: a reader, its steps and readings; evaluate, tune, meta-train and audit in one call each."""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import dynlm
from dynlm.evaluation.stream import score_only
from dynlm.session.session import load_session
from golden import text

TEXT = text(3, 120)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def kit():
    torch.set_num_threads(1)
    return load_session("wikitext2")


@pytest.fixture
def reader(kit):
    return dynlm.Reader(kit, "rms")


def weights(reader):
    return {name: p.detach().clone() for name, p in reader.session.model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_reading_holds_every_token_and_its_losses(reader, tmp_path):
    before = weights(reader)
    reading = reader.read(TEXT)
    assert same(before, weights(reader))
    assert "".join(token.text for token in reading.tokens) == TEXT
    assert reading.nats == pytest.approx(sum(token.adapted for token in reading.tokens), rel=1e-6)
    assert reading.gain == pytest.approx((reading.static_nats - reading.nats) / len(reading))
    assert reading.gain > 0.1  # its names repeat
    assert reading.bits_per_byte == pytest.approx(reading.nats / 0.6931471805599453 / len(TEXT.encode()))
    assert reading.bits_per_byte < reading.static_bits_per_byte
    assert f"{len(reading):,} tokens" in repr(reading)
    assert "bits per byte" in str(reading)
    reading.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().endswith("</html>")
    json.dumps(reading.to_dict(), allow_nan=False)
    frame = reading.to_pandas()
    assert frame["gain"].sum() == pytest.approx(reading.static_nats - reading.nats, rel=1e-4)
    assert list(frame["token"]) == [token.text for token in reading.tokens]


def test_a_text_a_path_and_an_article_are_read_alike(reader, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    readings = [reader.read(source) for source in (TEXT, path, dynlm.Article("a", "A", TEXT))]
    assert len({reading.nats for reading in readings}) == 1
    monkeypatch.chdir(tmp_path)
    for wrong, said in (
        ("a.txt", "is the name of a file"),
        ("  ", "the text is empty"),
        (Path("none"), "does not exist"),
    ):
        with pytest.raises(dynlm.InputError, match=said):
            reader.read(wrong)


def test_a_step_is_scored_under_the_weights_before_it(reader):
    """log_probs are those of the losses, the weights move once a step, and the update waits until it is asked for."""
    theta0, last = weights(reader), None
    for number, step in enumerate(reader.steps(TEXT)):
        before = step.before
        assert same(before, theta0) == (number == 0)
        assert last is None or same(before, last)
        picked = -step.log_probs().gather(1, step.targets[:, None])[:, 0]
        torch.testing.assert_close(picked.double(), step.losses, rtol=0, atol=1e-5)
        assert torch.equal(step.inputs[1:], step.targets[:-1])
        last = step.after
        assert not same(before, last)
        with pytest.raises(dynlm.InputError, match="before `after`"):
            _ = step.before
    assert number > 3
    assert same(theta0, weights(reader))


def test_looking_at_steps_changes_nothing(reader, kit):
    looked = [(step.losses, step.before, step.after)[0] for step in reader.steps(TEXT)]
    assert float(torch.cat(looked).sum()) == dynlm.Reader(kit, "rms").read(TEXT).nats


def test_what_was_learned_is_lent_and_given_back(reader):
    theta0 = weights(reader)
    reader.read(TEXT)
    learned = {}
    with reader.adapted() as model:
        learned = weights(reader)
        assert not same(learned, theta0)
        assert model.generate(torch.tensor([[5]]), max_new_tokens=3).shape == (1, 4)
    assert same(theta0, weights(reader))
    with reader.adapted():
        assert same(learned, weights(reader))
    reader.forget()
    with reader.adapted():
        assert same(theta0, weights(reader))


def test_a_loop_that_is_left_has_learned_from_its_last_step(reader):
    for step in reader.steps(TEXT):
        before = step.before
        break
    with reader.adapted():
        assert same(weights(reader), step.after)
        assert not same(weights(reader), before)


def test_a_stream_whose_loop_is_left_inside_a_lease_has_learned_from_its_last_step():
    gains = []
    for leased in (False, True):
        reader = dynlm.Reader(load_session("wikitext2", "never"), "rms")
        with reader if leased else nullcontext():
            for _ in reader.steps(TEXT):
                break
            gains.append(reader.read(TEXT).gain)
    assert gains[0] == gains[1]


def test_two_readers_of_one_model_do_not_read_at_once(reader, kit):
    with reader, pytest.raises(dynlm.InputError, match="leave its `with` first"):
        dynlm.Reader(kit, "gated").read(TEXT)
    assert dynlm.Reader(kit, "gated").read(TEXT).gain > 0


def test_one_stream_goes_on_where_articles_start_anew(kit):
    whole = dynlm.Reader(load_session("wikitext2", "never"), "rms")
    first, second = whole.read(TEXT).gain, whole.read(TEXT).gain
    reader = dynlm.Reader(kit, "rms")
    again = [reader.read(TEXT).gain for _ in range(2)]
    assert again[0] == again[1]
    assert first == pytest.approx(again[0], abs=1e-6)
    assert second > first + 0.1


def test_adapted_weights_are_an_ordinary_model(reader, tmp_path):
    from transformers import AutoModelForCausalLM

    reader.read(TEXT)
    reader.save_pretrained(tmp_path / "adapted")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapted")
    with reader.adapted() as adapted:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), adapted.parameters(), strict=True))
    with pytest.raises(dynlm.InputError, match="exists: give the name of a new folder"):
        reader.save_pretrained(tmp_path / "adapted")


def test_evaluation_measures_what_reading_measures(reader, tmp_path):
    articles = [dynlm.Article(str(i), f"Text {i}", text(i, 100)) for i in range(3)]
    results = dynlm.evaluate(reader, articles, ["static", "rms", reader.session.rule("gated"), "stateless"])
    assert set(results.methods) == {"static", "rms", "gated", "stateless"}
    readings = [reader.read(article) for article in articles]
    assert results["static"]["nats"] == pytest.approx(sum(r.static_nats for r in readings), rel=1e-6)
    assert results["rms"]["nats"] == pytest.approx(sum(r.nats for r in readings), rel=1e-6)
    assert results["rms"]["kind"] == "hand-made"
    assert results["gated"]["kind"] == "learned"
    assert results.table().splitlines()[0].split()[0] in ("static", "stateless")
    assert list(results.to_pandas().index) == results.methods
    report = results.report(tmp_path / "out")
    assert "gated" in report.read_text()
    assert json.loads((tmp_path / "out/evaluate/results.json").read_text())["methods"].keys() == set(results.methods)
    with pytest.raises(dynlm.InputError, match="names 'rms' twice"):
        dynlm.evaluate(reader, articles, ["rms", "rms"])
    with pytest.raises(dynlm.InputError, match="no rule 'adam'"):
        dynlm.evaluate(reader, articles, ["adam"])
    with pytest.raises(dynlm.InputError, match="no article"):
        dynlm.evaluate(reader, [])


def test_rules_are_tuned_and_trained_in_one_call_each(reader, tmp_path):
    articles = [dynlm.Article(str(i), f"Text {i}", text(i, 80)) for i in range(5)]
    rms = dynlm.tune(reader, articles, "rms", trials=3, max_tokens=160)
    assert rms.made["nats_per_token"] < rms.made["static_nats_per_token"]
    gated = dynlm.meta_train(reader, articles, rms, tmp_path / "run", steps=2, articles=1, truncation=8)
    assert gated.name == "gated"
    assert (tmp_path / "run/rules/gated.safetensors").is_file()
    assert not list((tmp_path / "run/checkpoints").glob("*"))
    results = dynlm.evaluate(reader, articles[:2], [rms, gated])
    assert results.methods[0] == "static"
    for rule in (rms, gated):
        dynlm.optim.save_pretrained(rule, tmp_path / rule.name)
        loaded = dynlm.rules.from_pretrained(tmp_path / rule.name)
        assert (
            dynlm.Reader(reader.session, loaded).read(TEXT).nats == dynlm.Reader(reader.session, rule).read(TEXT).nats
        )
    with pytest.raises(dynlm.InputError, match="gated begins at rms"):
        dynlm.meta_train(reader, articles, dynlm.rules.SGD(), steps=2)
    with pytest.raises(dynlm.InputError, match="did you mean 'trials'"):
        dynlm.tune(reader, articles, "rms", trails=3)


def test_a_stream_is_read_with_the_rule_that_bears_it(ready):
    for reset, rule in (("article", "gated"), ("never", "rms")):
        assert dynlm.Reader.from_pretrained("wikitext2", reset=reset).rule.name == rule
        assert dynlm.Reader.from_pretrained(ready[1], reset=reset).rule.name == rule
    assert dynlm.Reader.from_pretrained("wikitext2", "gated", reset="never").rule.name == "gated"


def test_meta_training_goes_on_from_the_phi_that_ships(reader):
    articles, rms = [dynlm.Article(str(i), f"Text {i}", text(i, 80)) for i in range(4)], dynlm.rules.RMS(lr=1e-3)
    settings = {"phi": "reader", "steps": 1, "lr": 1e-12, "articles": 1, "truncation": 4, "validation_articles": 1}
    gated, shipped = dynlm.meta_train(reader, articles, rms, **settings), dynlm.rules.from_pretrained("reader")
    assert gated.config.lr == pytest.approx(1e-3)
    for name, tensor in shipped.state_dict().items():
        torch.testing.assert_close(gated.state_dict()[name], tensor)
    with pytest.raises(dynlm.InputError, match="general is a rule 'general': expected φ of a learned rule 'gated'"):
        dynlm.meta_train(reader, articles, rms, phi="general")
    with pytest.raises(dynlm.InputError, match="hidden is 8 beside phi 'reader'"):
        dynlm.meta_train(reader, articles, rms, phi="reader", hidden=8)


def test_an_audit_of_a_sound_reader_passes(reader):
    verdicts = dynlm.audit(reader, text(1, 200), text(2, 200), quick=True)
    assert [verdict.name for verdict in verdicts if not verdict.passed] == []
    assert len(verdicts) > 8


def test_a_model_of_transformers_is_read_from_its_folder_and_from_memory(ready, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = dynlm.Reader.from_pretrained(ready[1], rule="rms")
    reading = reader.read(TEXT)
    assert reading.gain > 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(ready[1]), AutoTokenizer.from_pretrained(ready[1])
    again = dynlm.Reader.from_pretrained(model, rule="rms", tokenizer=tokenizer)
    assert again.read(TEXT).nats == pytest.approx(reading.nats, rel=1e-6)
    results = dynlm.evaluate(model, [text(i, 80) for i in range(2)], ["rms"])
    assert results.methods[0] == "static"
    reader.save_pretrained(tmp_path / "adapted")
    assert AutoTokenizer.from_pretrained(tmp_path / "adapted").vocab_size == tokenizer.vocab_size
    with pytest.raises(dynlm.InputError, match="rule mlp without a run"):
        dynlm.Reader.from_pretrained(ready[1], rule="mlp")
    with pytest.raises(dynlm.InputError, match="give the model's tokenizer"):
        dynlm.Reader.from_pretrained(model, rule="rms", tokenizer="ordinary")


def test_a_reader_that_learns_nothing_leaves_the_prior_to_those_that_do(ready):
    """Its own reading needs none; the rules that are compared with it later get the measured one."""
    still = dynlm.Reader.from_pretrained(ready[1], rule="static")
    assert still.read(TEXT).gain == 0
    assert "priors" not in vars(still.session)
    articles = [text(i, 60) for i in range(2)]
    expected = dynlm.evaluate(dynlm.Reader.from_pretrained(ready[1]), articles, ["rms"])
    assert dynlm.evaluate(still, articles, ["rms"])["rms"]["nats"] == expected["rms"]["nats"]


def test_a_reader_is_evaluated_with_its_own_rule(reader):
    """Not with the one of the same name that the run holds."""
    slower = dynlm.Reader(reader.session, dynlm.rules.RMS(lr=1e-5))
    results = dynlm.evaluate(slower, [text(1, 100)])
    assert results["rms"]["nats"] == pytest.approx(slower.read(dynlm.Article("a", "A", text(1, 100))).nats, rel=1e-6)


def test_low_rank_weights_are_merged_into_what_is_saved(ready, tmp_path):
    from transformers import AutoModelForCausalLM

    reader = dynlm.Reader.from_pretrained(ready[1], rule="sgd", lora_rank=2, lr=0.5)
    assert reader.read(TEXT).gain > 0
    reader.save_pretrained(tmp_path / "adapted")
    merged, plain = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "adapted", ready[1]))
    with reader.adapted() as adapted:
        ids = torch.arange(8)[None]
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, plain(ids).logits, atol=1e-3)


@pytest.mark.skipif("DYNLM_TEST_MODEL" not in os.environ, reason="DYNLM_TEST_MODEL is not set")
def test_a_real_transformer_reads_and_is_evaluated():
    reader = dynlm.Reader.from_pretrained(os.environ["DYNLM_TEST_MODEL"])
    names = "Quernmoor met Ellisande in the park. Ellisande gave Quernmoor a big red ball, and Quernmoor was happy.\n"
    reading = reader.read(names * 6)
    assert reading.gain > 0.5
    with reader.adapted() as model:
        assert model.generate(torch.tensor([[1]]), max_new_tokens=3).shape[0] == 1
    results = dynlm.evaluate(reader, [names * 6, names * 3])
    assert results.methods == ["static", "gated"]
    assert [v for v in dynlm.audit(reader, names * 6, names * 8, quick=True) if not v.passed] == []


def test_texts_come_in_the_spacing_that_the_model_knows(reader):
    """Static losses of a reading are those of one pass over the text in that spacing; counts are the text's own."""
    (article,) = reader.session.tokenize([dynlm.Article("a", "A", TEXT)])
    losses_T = score_only(reader.session.reader(dynlm.rules.Static()), article, reader.session.tokenizer.start_id)
    assert reader.read(TEXT).static_nats == pytest.approx(float(losses_T.double().sum()), rel=1e-6)
    assert article.n_bytes == len(TEXT.encode())
    assert " ." in reader.session.tokenizer.decode(article.ids_T.tolist())
