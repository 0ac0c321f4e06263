"""Each check of scripts/house catches a planted offender, and a clean repository passes."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def load_house() -> ModuleType:
    """scripts/house has no .py suffix, so its loader is named."""
    loader = importlib.machinery.SourceFileLoader("house", str(ROOT / "scripts" / "house"))
    spec = importlib.util.spec_from_loader("house", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


house = load_house()

DOC = '"""A module."""\n'
MACHINE = "/" + "root/data"  # in two pieces: the check reads this file too
CLEAN = {
    "dynlm/__init__.py": "",
    "dynlm/low.py": DOC + "x = 1\n",
    "dynlm/data/__init__.py": "",
    "dynlm/data/high.py": DOC + "from dynlm.low import x\n\n\ndef f(a, b):\n    return a, b, x\n",
    "tests/test_low.py": "def test_one():\n    assert True\n" * 3,
    "docs/architecture.md": "The map: `dynlm/low.py`, `data/high.py`. See https://example.org/home/page\n",
}


def function(lines: int) -> str:
    return DOC + "def f():\n" + "    x = 1\n" * (lines - 1)


def parameters(names: str, indent: str = "") -> str:
    return f"{DOC}{'class A:' if indent else ''}\n{indent}def f({names}):\n{indent}    pass\n"


def imports(**modules: str) -> dict[str, str]:
    return {f"dynlm/{name}.py": f"{DOC}{line}\n" for name, line in modules.items()}


def plant(root: Path, files: dict[str, str]) -> Path:
    for path, text in {**CLEAN, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return root


OFFENDERS = [
    ("check_file_sizes", {"dynlm/long.py": DOC + "x = 1\n" * 400}, "dynlm/long.py: 401 lines, at most 400"),
    ("check_file_sizes", {"tests/test_long.py": "x = 1\n" * 401}, "tests/test_long.py: 401 lines, at most 400"),
    (
        "check_file_sizes",
        {f"dynlm/{name}.py": DOC + "x = 1\n" * 160 for name in "abcdef"},
        "dynlm: the median file has 161 lines, at most 150",
    ),
    ("check_function_lengths", {"dynlm/long.py": function(61)}, "dynlm/long.py:2 f: 61 lines, at most 60"),
    ("check_function_lengths", {"tests/long.py": function(61)}, "tests/long.py:2 f: 61 lines, at most 60"),
    (
        "check_parameters",
        {"dynlm/wide.py": parameters("a, b, c, d, e, *f, g, **h")},
        "f: 7 positional parameters, at most 6",
    ),
    (
        "check_parameters",
        {"tests/wide.py": parameters("self, a, b, c, d, e, f, g", "    ")},
        "f: 7 positional parameters, at most 6",
    ),
    ("check_names", {"dynlm/data/utils_io.py": DOC}, "dynlm/data/utils_io.py"),
    ("check_names", {"tests/utils.py": DOC}, "tests/utils.py"),
    ("check_docstrings", {"dynlm/data/bare.py": "x = 1\n"}, "dynlm/data/bare.py: no docstring"),
    ("check_cycles", imports(a="import dynlm.b", b="from dynlm import a"), "dynlm.a -> dynlm.b -> dynlm.a"),
    ("check_cycles", imports(a="from .b import x", b="def f():\n    from dynlm.a import y"), "dynlm.a -> dynlm.b"),
    (
        "check_cycles",
        {"dynlm/__init__.py": "from dynlm.a import x\n", **imports(a="from dynlm import y")},
        "dynlm -> dynlm.a -> dynlm",
    ),
    (
        "check_test_imports",
        {"tests/test_b.py": "from data.test_a import x\n"},
        "tests/test_b.py:1: imports data.test_a.x",
    ),
    ("check_test_imports", {"tests/test_b.py": "def f():\n    import tests.conftest\n"}, "imports tests.conftest"),
    ("check_test_share", {"dynlm/more.py": DOC + "x = 1\n" * 100}, "tests: 6 lines for 109 lines of dynlm"),
    (
        "check_file_map",
        {"dynlm/data/low.py": DOC},
        "docs/architecture.md: the file map does not name dynlm/data/low.py",
    ),
    (
        "check_file_map",
        {"docs/architecture.md": "`dynlm/old.py`"},
        "docs/architecture.md: names dynlm/old.py, which does not exist",
    ),
    (
        "check_machine_paths",
        {"docs/LOG.md": f"one\nsee {MACHINE}\n"},
        f"docs/LOG.md:2: path of one machine: see {MACHINE}",
    ),
    ("check_pickles", {"dynlm/save.py": DOC + "import pickle\n"}, "dynlm/save.py:2: pickle"),
    ("check_pickles", {"dynlm/save.py": DOC + "from pickle import dump\n"}, "dynlm/save.py:2: pickle.dump"),
    ("check_pickles", {"dynlm/save.py": DOC + "import torch\ntorch.save(1, 'x')\n"}, "dynlm/save.py:3: torch.save"),
    ("check_pickles", {"dynlm/save.py": DOC + "from torch import load\n"}, "dynlm/save.py:2: torch.load"),
]


@pytest.mark.parametrize(("check", "files", "expected"), OFFENDERS)
def test_check_catches_a_planted_offender(tmp_path: Path, check: str, files: dict[str, str], expected: str) -> None:
    offenders = getattr(house, check)(house.Repository(plant(tmp_path, files)))
    assert any(expected in offender for offender in offenders), offenders


def test_every_check_has_a_planted_offender() -> None:
    assert {name for name, _, _ in OFFENDERS} == {check.__name__ for check in house.CHECKS}


INNOCENT = [
    ("check_file_sizes", {"dynlm/long.py": DOC + "x = 1\n" * 399}),
    ("check_file_sizes", {f"tests/test_{name}.py": "x = 1\n" * 160 for name in "abcdef"}),
    ("check_function_lengths", {"tests/long.py": function(61) + "def g(): pass\n" * 19}),
    ("check_parameters", {"tests/wide.py": parameters("self, a, b, c, d, e, f", "    ")}),
    ("check_parameters", {"tests/wide.py": parameters("a, b, c, d, e, f")}),
    ("check_parameters", {"tests/wide.py": parameters("a, b, c, d, e, f, *, g, h, i")}),
    ("check_cycles", {"dynlm/low.py": DOC + "if TYPE_CHECKING:\n    from dynlm.data.high import f\n"}),
    ("check_test_imports", {"tests/test_b.py": "from support.rules import make\nfrom dynlm.test_a import b\n"}),
    ("check_test_share", {"dynlm/low.py": DOC + "x = 1\n" * 5}),
    ("check_machine_paths", {"docs/LOG.md": "a/work/b, ../home/c, x.org/root/d\n"}),
    ("check_pickles", {"dynlm/low.py": '"""Never pickle, never torch.save."""\n'}),
]


@pytest.mark.parametrize(("check", "files"), INNOCENT)
def test_check_lets_the_innocent_pass(tmp_path: Path, check: str, files: dict[str, str]) -> None:
    assert getattr(house, check)(house.Repository(plant(tmp_path, files))) == []


def test_main_prints_every_offender(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path, {"dynlm/utils.py": "import pickle\n"})
    assert house.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "dynlm/utils.py",
        "dynlm/utils.py",
        "docs/architecture.md",
        "dynlm/utils.py",
    ]


def test_main_prints_the_figures_of_a_clean_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (plant(tmp_path, {}) / "docs.bin").write_bytes(b"\xff\xfe")
    assert house.main([str(tmp_path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "house: 4 files, median 1 lines, longest 6; 1 functions, 100.0% within 60 lines; 6 test lines"
    )


def test_main_names_a_file_that_does_not_parse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path, {"dynlm/broken.py": "def f(:\n"})
    assert house.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith("dynlm/broken.py:1: ")


def test_ignored_files_are_not_read(tmp_path: Path) -> None:
    plant(tmp_path, {".gitignore": "build/\n", "dynlm/build/utils.py": "", "dynlm/new.py": DOC})
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    paths = house.Repository(tmp_path).paths
    assert "dynlm/new.py" in paths
    assert "dynlm/build/utils.py" not in paths
