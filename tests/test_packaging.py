"""The wheel holds all that dynlm reads from its own folder: what ships, templates, the demo's recipe."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dynlm

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


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), really built; the wheel from what the sdist holds, as an installer of it would."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    folder = tmp_path_factory.mktemp("built")

    def build(target, source):
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
        subprocess.run(command, cwd=source, check=True, capture_output=True)

    build("sdist", ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    build("wheel", folder / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = folder.glob("*.whl")
    return wheel, sdist


def test_both_packages_carry_the_one_version_and_the_sdist_all_that_a_checkout_has(built):
    wheel, sdist = built
    assert wheel.name == f"dynlm-{dynlm.__version__}-py3-none-any.whl"
    assert sdist.name == f"dynlm-{dynlm.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = ("pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "recipes/general.toml", "scripts/test")
    assert {*needed, "tests/lab.py", "examples/own_rule.py", *data_files()} <= held
    assert not any(name.startswith((".venv", "runs/", "dist/")) for name in held)


def test_the_wheel_reads_and_finds_recipes_from_an_empty_folder(built, tmp_path):
    with zipfile.ZipFile(built[0]) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    recipes = {f"dynlm/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.toml")}
    assert {name for name in names if not name.startswith("dynlm-")} == data_files() | recipes
    metadata = (tmp_path / f"installed/dynlm-{dynlm.__version__}.dist-info/METADATA").read_text(encoding="utf-8")
    assert "Requires-Dist: torch>=2.6\n" in metadata
    assert "Requires-Dist: optuna>=4; extra == 'all'" in metadata.replace('"', "'")
    code = """
import dynlm
from dynlm.stages.recipe import find_recipe, load_recipe
assert "installed" in dynlm.__file__
print(load_recipe(find_recipe("wikitext2-cpu")).data.source)
print(dynlm.optim.load("general").name)
print(len(dynlm.Reader.from_pretrained("wikitext2").session.priors))
"""
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["$DYNLM_WIKITEXT2", "general", "5"], done.stderr


def test_the_wheel_declares_the_licenses_of_code_and_weights():
    metadata = pytest.importorskip("hatchling.metadata.core", reason="hatchling is not installed")
    plugins = pytest.importorskip("hatchling.plugin.manager").PluginManager()
    core = metadata.ProjectMetadata(str(ROOT), plugins).core
    assert core.license_expression == "Apache-2.0 AND CC-BY-SA-3.0"
    shipped = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "dynlm" / "shipped").glob("*/LICENSE.md"))
    assert shipped
    assert core.license_files == ["LICENSE", *shipped]
