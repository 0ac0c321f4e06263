"""Rules to share: by name, in folders, on the hub."""

import shutil
import subprocess
import sys

import huggingface_hub
import pytest

import dynlm.optim
from dynlm.optim import LearnedOptimizer, hub, sharing
from dynlm.optim.base import Rule
from dynlm.optim.general import General
from dynlm.optim.library import make_rule
from dynlm.types import InputError
from support.optimizers import (
    for_rules,
    make_parameters,
    moved,
    run,
    same,
)

pytestmark = pytest.mark.usefixtures("eager")


@for_rules
def test_rules_survive_the_folder(name, tmp_path):
    rule = moved(name)
    file = dynlm.optim.save_pretrained(rule, tmp_path / "rule", {"steps": 7})
    for place in (tmp_path / "rule", str(tmp_path / "rule"), file):
        again = dynlm.optim.load(place)
        assert isinstance(again, Rule)
        assert sharing.fingerprint(again) == sharing.fingerprint(rule)
    card = (tmp_path / "rule" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert f"`{name}`" in card
    assert "- steps: 7" in card
    a, b = make_parameters(), make_parameters()
    run(LearnedOptimizer(a, str(tmp_path / "rule")), a, range(2))
    run(LearnedOptimizer(b, rule), b, range(2))
    same(a, b)


def test_rules_that_ship_go_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "SHIPPED", {})
    with pytest.raises(InputError, match=r"no rule 'general': .* or one of static, sgd"):
        LearnedOptimizer(make_parameters())
    monkeypatch.setattr(hub, "SHIPPED", {"general": tmp_path / "general.safetensors"})
    dynlm.optim.save_pretrained(General(seed=3), tmp_path / "made")
    shutil.copy(tmp_path / "made" / "rule.safetensors", tmp_path / "general.safetensors")
    optimizer = LearnedOptimizer(make_parameters())
    assert sharing.fingerprint(optimizer.rule) == sharing.fingerprint(General(seed=3))
    with pytest.raises(InputError, match=r"no rule 'other': .* or one of general, static"):
        dynlm.optim.load("other")


@pytest.mark.parametrize("name", ["sgd", "adam", "rms"])
def test_hand_made_rules_by_name_have_their_defaults(name):
    a, b = make_parameters(), make_parameters()
    run(LearnedOptimizer(a, name), a, range(2))
    run(LearnedOptimizer(b, make_rule(name)), b, range(2))
    same(a, b)


def test_the_hub_is_asked_for_what_is_no_path(tmp_path, monkeypatch):
    file, asked = dynlm.optim.save_pretrained(General(), tmp_path), []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names: asked.append(names) or str(file))
    assert sharing.fingerprint(dynlm.optim.load("somebody/rule")) == sharing.fingerprint(General())
    assert asked == [("somebody/rule", "rule.safetensors")]

    def offline(*_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match=r"no local path 'somebody/rule'.*no connection\): check both$"):
        dynlm.optim.load("somebody/rule")


def test_a_rule_is_uploaded_as_it_is_saved(monkeypatch):
    done = []

    class Api:
        def create_repo(self, repo_id, exist_ok):
            done.append(("create", repo_id, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            rule = dynlm.optim.load(folder_path)
            done.append(("upload", repo_id, sharing.fingerprint(rule)))
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert dynlm.optim.push_to_hub(General(), "somebody/rule") == "address"
    assert done == [("create", "somebody/rule", True), ("upload", "somebody/rule", sharing.fingerprint(General()))]
    with pytest.raises(InputError, match="'rule' is not the name of a hub repository"):
        dynlm.optim.push_to_hub(General(), "rule")

    def refuse(*_, **__):
        raise OSError("no login")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(InputError, match=r"cannot upload to somebody/rule \(no login\)"):
        dynlm.optim.push_to_hub(General(), "somebody/rule")


def test_broken_rule_files_are_one_clear_line(tmp_path):
    file = dynlm.optim.save_pretrained(General(), tmp_path)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match="truncated or not safetensors"):
        dynlm.optim.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no rule '.*empty': give a file, a folder with rule.safetensors"):
        LearnedOptimizer(make_parameters(), tmp_path / "empty")


def test_the_optimizer_needs_no_framework():
    code = "import dynlm.optim, sys; dynlm.optim.LearnedOptimizer; dynlm.optim.load; " + "; ".join(
        f"assert {name!r} not in sys.modules" for name in ("transformers", "accelerate", "huggingface_hub", "datasets")
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        dynlm.optim.Nothing  # noqa: B018
