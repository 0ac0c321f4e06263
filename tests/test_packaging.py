"""The wheel holds all that dynlm reads from its own folder: what ships, templates, the demo's recipe."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".safetensors", ".json", ".model", ".md", ".toml", ".j2", ".css", ".js", ".cpp", ".typed"}
NEEDED = (
    "dynlm/shipped/wikitext2/kit.json",
    "dynlm/shipped/wikitext2/LICENSE.md",
    "dynlm/shipped/wikitext2/model/config.json",
    "dynlm/shipped/wikitext2/model/model.safetensors",
    "dynlm/shipped/wikitext2/model/tokenizer.json",
    "dynlm/shipped/wikitext2/model/tokenizer_config.json",
    "dynlm/shipped/wikitext2/model/dynlm_lstm.py",
    "dynlm/shipped/wikitext2/prior.safetensors",
    "dynlm/shipped/wikitext2/recipe.json",
    "dynlm/shipped/wikitext2/rules/gated.safetensors",
    "dynlm/shipped/wikitext2/tokenizer/sentencepiece.model",
    "dynlm/optim/pretrained/general.safetensors",
    "dynlm/report/template.html.j2",
    "dynlm/report/tokenmap.html.j2",
    "dynlm/cli/demo.toml",
)


def data_files():
    """Every file of the package that is no by-product of running it."""
    files = (path for path in (ROOT / "dynlm").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_what_is_read_at_run_time_is_there():
    assert set(NEEDED) <= data_files()
    assert {Path(name).suffix for name in data_files()} <= SUFFIXES | {""}


def test_git_ignores_no_file_of_the_package():
    """Hatch leaves out of a wheel what git ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: nothing says what is ignored")
    command = ["git", "-C", str(ROOT), "check-ignore", "--no-index", *sorted(data_files())]
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""


def test_the_wheel_holds_every_file_of_the_package():
    wheel = pytest.importorskip(
        "hatchling.builders.wheel", reason="hatchling, which builds the wheel, is not installed"
    )
    held = {file.distribution_path for file in wheel.WheelBuilder(str(ROOT)).recurse_included_files()}
    recipes = {f"dynlm/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.toml")}
    assert recipes
    assert held == data_files() | recipes


def test_the_wheel_declares_the_licenses_of_code_and_weights():
    metadata = pytest.importorskip("hatchling.metadata.core", reason="hatchling is not installed")
    plugins = pytest.importorskip("hatchling.plugin.manager").PluginManager()
    core = metadata.ProjectMetadata(str(ROOT), plugins).core
    assert core.license_expression == "Apache-2.0 AND CC-BY-SA-3.0"
    shipped = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "dynlm" / "shipped").glob("*/LICENSE.md"))
    assert shipped
    assert core.license_files == ["LICENSE", *shipped]
