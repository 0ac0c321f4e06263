"""What the README shows is true of the code."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dynlm
from dynlm.cli.main import COMMANDS
from dynlm.meta.replay import Replay
from dynlm.optim.registry import tuned
from golden import text
from lab import make_article, make_lab, make_transformer_lab
from support.rules import make
from support.windows import gradients, read_window

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_rule_of_the_readme_reads_and_gets_a_meta_gradient(own_rules):
    names = {}
    exec(BLOCKS[1], names)
    rule = names["SignDescent"](1e-2)
    recording, *_ = read_window(make_lab(), rule, 30)
    Replay(rule)(recording)
    assert gradients(rule)["lr"] != 0
    assert tuned()[-1] == "sign"


def test_the_unroll_of_the_readme_differentiates():
    lab = make_lab()
    rule = make("gated", lab[2])
    _, start, pieces, weights, _ = read_window(lab, rule, 30)
    names = {"model": lab[0], "score": lab[1], "priors": lab[2], "rule": rule, "start": start}
    exec(BLOCKS[2], names | {"pieces": pieces, "weights": weights})
    assert all(g.abs().max() > 0 for g in gradients(rule).values())


def test_the_front_door_of_the_readme_opens(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    articles = [dynlm.Article(str(i), f"Text {i}", text(i, 60)) for i in range(7)]
    names = {
        "text": text(8, 120),
        "articles": articles[:2],
        "other_articles": articles[2:],
        "prompt": torch.tensor([[5]]),
    }
    code = BLOCKS[0].replace("trials=20", "trials=2").replace("steps=100", "steps=2, articles=1, truncation=8")
    exec(code, names)
    assert (tmp_path / "page.html").read_text().endswith("</html>")
    assert names["reading"].gain > 0
    assert names["results"].methods[0] == "static"
    assert names["gated"].made["start"] == names["rms"].settings()


def test_the_training_loop_of_the_readme_learns():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 32, 64, generator=generator)
    batches = [(x, x[:, :10].argmax(1)) for x in inputs]
    names = {"batches": batches}
    torch.manual_seed(0)
    exec(BLOCKS[3], names)
    with torch.no_grad():
        logits = names["model"](inputs[-1])
    assert torch.nn.functional.cross_entropy(logits, batches[-1][1]) < 1.5  # from ln 10 = 2.3


def test_the_trainer_of_the_readme_trains(tmp_path):
    model, *_ = make_transformer_lab(torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    ids = make_article(16 * 16).ids_T.view(16, 16)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    names = {"model": model, "folder": str(tmp_path), "train_dataset": rows}
    exec(BLOCKS[4].replace("report_to=[]", 'report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True'), names)
    losses = [record["train_loss"] for record in names["trainer"].state.log_history if "train_loss" in record]
    assert losses[0] < 3.1  # from ln 23
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("line", re.findall(r"^    dynlm (\S+) +(\S+\.toml)", README, re.MULTILINE))
def test_commands_and_recipes_of_the_readme_exist(line):
    command, recipe = line
    assert command in COMMANDS
    assert (ROOT / recipe).is_file()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`?((?:scripts|docs)/[\w.]+)", README))))
def test_files_of_the_readme_exist(path):
    assert (ROOT / path).exists()


def test_every_figure_of_the_readme_is_the_one_in_docs_results():
    """Byte for byte: `scripts/figures` takes each figure from a result file by its key."""
    done = subprocess.run([sys.executable, ROOT / "scripts" / "figures", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"run scripts/figures, or edit docs/results/readme.md.j2\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("figure", ["111.77", "0.963", "[0.0242, 0.0311]", "2,412.07", "390,631", "57k"])
def test_one_wrong_digit_among_the_figures_is_found(figure, tmp_path):
    for folder in ("docs/results", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    digit = re.search(r"\d", figure[::-1])
    place = README.index(figure) + len(figure) - 1 - digit.start()
    wrong = README[:place] + str((int(README[place]) + 1) % 10) + README[place + 1 :]
    (tmp_path / "README.md").write_text(wrong, encoding="utf-8")
    command = [sys.executable, tmp_path / "scripts" / "figures", "--check"]
    assert subprocess.run(command, capture_output=True).returncode == 1


@pytest.mark.skipif(not os.environ.get("CI"), reason="other releases in the ranges are welcome outside of CI")
def test_torch_is_the_tested_one():
    pinned = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert torch.__version__.split("+")[0] == pinned.group(1)
