"""Workflows, templates and other files for visitors say what is true."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import dynlm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_are_workflows_for_tests_documentation_and_releases():
    assert [path.stem for path in WORKFLOWS] == ["docs", "release", "test"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_a_workflow_runs_what_exists_and_may_do_no_more_than_it_must(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        assert "@" in step.get("uses", "@")
        for name in re.findall(r"(?:scripts|examples|dynlm)/[\w./]*\w", step.get("run", "")):
            assert (ROOT / name).exists(), name
    extras = {extra for step in steps(workflow) for extra in re.findall(r'\[([a-z,]+)\]"', step.get("run", ""))}
    known = {*PROJECT["optional-dependencies"], "docs"}
    assert {name for extra in extras for name in extra.split(",")} <= known
    for job in workflow["jobs"].values():
        assert set(job.get("needs", "").split()) <= set(workflow["jobs"])


def test_every_python_that_the_package_names_is_tested_on_both_systems():
    matrix = load(ROOT / ".github/workflows/test.yml")["jobs"]["versions"]["strategy"]["matrix"]
    named = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)
    assert matrix["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert matrix["os"] == ["ubuntu-latest", "macos-latest"]
    assert [more["releases"] for more in matrix["include"]] == ["lowest"]


def test_only_a_tagged_release_of_the_version_in_force_is_published(tmp_path):
    workflow = load(ROOT / ".github/workflows/release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` as true
    assert workflow["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    (check,) = [step["run"] for step in steps(workflow) if step.get("name") == "the tag is the version"]
    (tmp_path / "dynlm").mkdir()
    (tmp_path / "dynlm" / "__init__.py").write_text((ROOT / "dynlm" / "__init__.py").read_text())
    (tmp_path / "CHANGELOG.md").write_text(f"## [{dynlm.__version__}] - 2026-11-27\n")

    def passes(tag):
        environment = {"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"}
        return not subprocess.run(["bash", "-e", "-c", check], cwd=tmp_path, env=environment).returncode

    assert passes(f"v{dynlm.__version__}")
    assert not passes("v99.0.0")
    (tmp_path / "CHANGELOG.md").write_text(f"## [{dynlm.__version__}] - Unreleased\n")
    assert not passes(f"v{dynlm.__version__}")


def test_pre_commit_has_the_ruff_that_was_tested():
    repositories = load(ROOT / ".pre-commit-config.yaml")["repos"]
    pinned = re.search(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    assert [r["rev"] for r in repositories if "ruff" in r["repo"]] == [f"v{pinned}"]
    (house,) = [hook for r in repositories if r["repo"] == "local" for hook in r["hooks"]]
    assert (ROOT / house["entry"]).is_file()


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_are_whole(path):
    form = load(path)
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) > 0
    assert all(field["attributes"]["label"] for field in form["body"])


def test_the_citation_is_of_this_package():
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["title"].startswith(f"{PROJECT['name']}: ")
    assert citation["license"] in PROJECT["license"]
    assert "version" not in citation  # dynlm.__version__ is the one place
    papers = [paper["identifiers"][0]["value"] for paper in citation["references"]]
    assert papers == ["arXiv:1803.10631", "arXiv:1805.05758"]


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_files_that_they_name_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:scripts|docs|tests|dynlm|examples)/[\w./]*\w", text))
    assert all((ROOT / path).exists() for path in named), named


def test_the_address_of_the_repository_is_said_in_one_place():
    address = PROJECT["urls"]["Repository"]
    listed = subprocess.run(["git", "-C", str(ROOT), "grep", "-lF", address], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    assert listed.stdout.split() == ["pyproject.toml"]
