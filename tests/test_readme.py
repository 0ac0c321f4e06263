"""What the README shows is true of the code."""

import re
from pathlib import Path

import pytest
import torch

from dynlm.cli.main import COMMANDS
from dynlm.meta.replay import Replay
from dynlm.optim.base import Rule, columns
from dynlm.optim.handmade import scalar
from lab import make_lab
from meta.test_replay import RULES, gradients, read_window

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_rule_of_the_readme_reads_and_gets_a_meta_gradient():
    names = {"Rule": Rule, "scalar": scalar, "columns": columns}
    exec(BLOCKS[0], names)
    rule = names["SignDescent"](1e-2)
    recording, *_ = read_window(make_lab(), rule, 30)
    Replay(rule)(recording)
    assert gradients(rule)["lr"] != 0


def test_the_unroll_of_the_readme_differentiates():
    lab = make_lab()
    rule = RULES["gated"](lab[2])
    _, start, pieces, weights, _ = read_window(lab, rule, 30)
    names = {"model": lab[0], "score": lab[1], "priors": lab[2], "rule": rule, "start": start}
    exec(BLOCKS[2], names | {"pieces": pieces, "weights": weights})
    assert all(g.abs().max() > 0 for g in gradients(rule).values())


def test_public_names_of_the_readme_exist():
    line = next(line for line in BLOCKS[1].splitlines() if line.startswith("from dynlm import"))
    exec(line, {})


@pytest.mark.parametrize("line", re.findall(r"^    dynlm (\S+) +(\S+\.toml)", README, re.MULTILINE))
def test_commands_and_recipes_of_the_readme_exist(line):
    command, recipe = line
    assert command in COMMANDS
    assert (ROOT / recipe).is_file()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`?((?:scripts|docs)/[\w.]+)", README))))
def test_files_of_the_readme_exist(path):
    assert (ROOT / path).exists()


def test_every_result_of_the_readme_is_in_the_log():
    log = (ROOT / "docs" / "LOG.md").read_text(encoding="utf-8")
    table = README[README.index("## Results") : README.index("## File map")]
    figures = re.findall(r"\b\d+\.\d+\b", table.replace("95 %", ""))
    assert figures
    assert not [figure for figure in figures if figure not in log]


def test_torch_is_the_tested_one():
    pinned = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert torch.__version__.split("+")[0] == pinned.group(1)
