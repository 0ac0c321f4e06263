"""Names of methods, as settings and results spell them and as files do."""

import pytest

from dynlm.files import write_tensors
from dynlm.methods import Method
from dynlm.optim.handmade import RMS
from dynlm.optim.library import load_rule
from dynlm.optim.sharing import save_rule
from dynlm.runs import Run
from dynlm.types import InputError

NAMES = [
    ("gated", Method("gated"), "gated"),
    ("gated#1", Method("gated", 1), "gated-seed1"),
    ("gated@fomaml", Method("gated", start="fomaml"), "gated-from-fomaml"),
    ("gated#12@maml+cache", Method("gated", 12, "maml", True), "gated-seed12-from-maml-cache"),
    ("cache", Method("static", cache=True), "cache"),
    ("static@joint+cache", Method("static", start="joint", cache=True), "static-from-joint-cache"),
    ("rms+cache", Method("rms", cache=True), "rms-cache"),
    ("rms+mix", Method("rms", mix=True), "rms-mix"),
    ("cache+mix", Method("static", cache=True, mix=True), "cache-mix"),
    ("gated#1@maml+cache+mix", Method("gated", 1, "maml", True, True), "gated-seed1-from-maml-cache-mix"),
    ("stateless", Method("stateless"), "stateless"),
    ("my.rule-2", Method("my.rule-2"), "my.rule-2"),
    ("cached", Method("cached"), "cached"),
]


@pytest.mark.parametrize(("name", "method", "stem"), NAMES)
def test_names_of_settings_and_of_files_are_read_as_one(name, method, stem):
    assert Method.parse(name) == method
    assert str(method) == name
    assert method.stem == stem
    assert Method.parse(stem) == Method.parse(f"{stem}.safetensors") == Method.parse(f"{name}.safetensors") == method


def test_what_stands_beside_a_cache_and_spellings_of_one_method():
    method = Method.parse("gated#1@fomaml+cache")
    assert str(method.inner) == "gated#1@fomaml"
    mixed = Method.parse("gated+cache+mix")
    assert (str(mixed.inner), str(mixed.inner.inner)) == ("gated+cache", "gated")
    assert str(Method.parse("static+cache")) == "cache"
    assert str(Method.parse("gated#0")) == "gated"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "+cache",
        "#1",
        "../rms",
        ".rms",
        "gated#",
        "gated@",
        "a b",
        "cache+cache",
        "rms+x",
        "x-cache#1",
        "rms+mix+cache",
    ],
)
def test_other_names_are_refused(name):
    assert Method.find(name) is None
    with pytest.raises(InputError, match=r"is no method: write it as gated, gated#1, gated@fomaml or gated\+cache"):
        Method.parse(name)


def test_new_files_have_names_that_every_tool_takes(tmp_path):
    run = Run(tmp_path)
    files = [run.rule("gated#1@maml+cache"), run.checkpoint("meta-train-seed1"), run.log("meta-train-seed1")]
    assert [path.name for path in files] == [
        "gated-seed1-from-maml-cache.safetensors",
        "meta-train-seed1.safetensors",
        "meta-train-seed1.jsonl",
    ]


def test_files_of_earlier_versions_are_still_read(tmp_path):
    run = Run(tmp_path)
    for name in ("rms", "gated#1", "rms+cache"):
        write_tensors(tmp_path / "rules" / name, {})
    save_rule(RMS(lr=0.5), tmp_path / "rules" / "rms")
    assert run.rules() == ["gated#1", "rms", "rms+cache"]
    assert load_rule(run.rule("rms"))[0].settings()["lr"] == 0.5
    assert run.rule("gated#1").name == "gated#1"
    for path in (tmp_path / "checkpoints" / "meta-train#1.safetensors", tmp_path / "meta-train#1.jsonl"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    assert run.checkpoint("meta-train-seed1").name == "meta-train#1.safetensors"
    assert run.log("meta-train-seed1").name == "meta-train#1.jsonl"
    save_rule(RMS(lr=0.25), tmp_path / "rules" / "rms.safetensors")  # a newer one takes its place
    assert load_rule(run.rule("rms"))[0].settings()["lr"] == 0.25
    assert run.rules() == ["gated#1", "rms", "rms+cache"]


def test_only_rules_are_listed_among_the_files_of_a_run(tmp_path):
    save_rule(RMS(), Run(tmp_path).rule("rms"))
    (tmp_path / "rules" / "notes.txt").write_text("mine")
    (tmp_path / "rules" / "a b.safetensors").write_text("mine")
    (tmp_path / "rules" / ".rms.safetensors.x1").mkdir()
    assert Run(tmp_path).rules() == ["rms"]
