"""What needs no extra runs without any; what needs one says which, in one line."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dynlm
from dynlm.lazy import EXTRAS, optional
from dynlm.meta.tune import TuneConfig, tune_rule
from support.commands import fails

ROOT = Path(__file__).parents[1]
BARE = f"""
import sys
for name in {(*sorted(EXTRAS), "pandas", "yaml", "requests")!r}:
    sys.modules[name] = None  # an import fails
"""


def run(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", BARE + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_a_step_of_the_optimizer_needs_torch_numpy_and_safetensors_alone():
    code = """
import torch
from dynlm import LearnedOptimizer

weight = torch.nn.Parameter(torch.ones(4, 3))
optimizer = LearnedOptimizer([weight], lr=1e-3)
for _ in range(2):
    optimizer.zero_grad()
    weight.square().sum().backward()
    optimizer.step()
print(float((1 - weight).min()))
"""
    (moved,), _ = run(code)
    assert float(moved) > 1e-4


def test_every_public_name_is_there_or_says_what_it_needs():
    code = """
import dynlm
from dynlm.cli.main import main

for name in dynlm.__all__:
    try:
        getattr(dynlm, name)
    except dynlm.InputError as error:
        print(f"{name}: {error}")
    else:
        print(f"{name}: there")
for arguments in ([], ["--help"], ["train"], ["read", "text.txt"]):
    assert main(arguments) == 2
assert main(["--version"]) == 0
"""
    printed, said = run(code)
    assert printed[-1] == f"dynlm {dynlm.__version__}"
    found = dict(line.split(": ", 1) for line in printed[:-1])
    assert set(found) == set(dynlm.__all__)
    assert {"Article", "InputError", "LearnedOptimizer", "Rule", "rules"} <= {
        n for n, s in found.items() if s == "there"
    }
    lines = [line for line in found.values() if line != "there"]
    assert found["LSTMForCausalLM"] in lines
    assert len(said) == 4
    for line in [*lines, *said]:
        assert " needs " in line
        assert line.endswith('which is not installed: pip install "dynlm[lm]", or dynlm[all]')


def test_tuning_without_optuna_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(dynlm.InputError, match=r'tuning needs optuna, .*: pip install "dynlm\[tune\]"'):
        tune_rule("rms", lambda rule: None, [], 0, TuneConfig())


def test_a_report_without_matplotlib_is_one_line(monkeypatch, tmp_path, capsys):
    for name in [name for name in sys.modules if name.startswith("dynlm.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(capsys, ["report", "--run", tmp_path], "needs matplotlib", 'pip install "dynlm[report]"')


def test_a_library_that_is_of_no_extra_is_no_input_error():
    with pytest.raises(ModuleNotFoundError), optional("nothing"):
        import no_such_library  # noqa: F401


def test_the_table_is_that_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [Requirement(line).name for line in project["dependencies"]] == ["torch", "numpy", "safetensors"]
    for extra in ("lm", "tune", "report", "lora", "gguf"):
        names = {Requirement(line).name for line in project["optional-dependencies"][extra]} - {"dynlm"}
        assert names <= {library for library, of in EXTRAS.items() if of == extra}
    (everything,) = project["optional-dependencies"]["all"]
    assert Requirement(everything).extras == set(EXTRAS.values())
    assert "dynlm[all,docs]" in project["optional-dependencies"]["dev"]
