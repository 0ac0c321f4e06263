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
from golden import text
from support.pages import PAGES, ROOT, blocks, run, runs

README = PAGES["README.md"]


def make_articles(numbers):
    return [dynlm.Article(str(i), f"Text {i}", text(i, 60)) for i in numbers]


def test_the_readme_is_short_and_shows_the_picture_first():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert "](docs/picture.svg)" in "\n".join(lines[:8])


@runs("README.md")
def test_the_readme_reads_evaluates_and_optimizes(ready, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ready[1], "my-model")
    Path("my-text.txt").write_text(text(8, 300))
    names = {"articles_to_tune_on": make_articles(range(2, 5)), "articles": make_articles(range(2))}
    names |= {"model": torch.nn.Linear(2, 2)}
    run("README.md", names, trials="2")
    assert Path("page.html").read_text().endswith("</html>")
    assert names["reading"].gain > 0
    assert sorted(names["results"].methods) == ["rms", "static"]
    assert Path("report/report.html").read_text().endswith("</html>")
    assert all("mlp" in prior.name for prior in names["reader"].session.priors)
    assert [group["lr"] for group in names["optimizer"].param_groups] == [1e-3]


def test_the_optimizer_of_the_readme_is_one_changed_word():
    (line,) = [line for line in blocks("README.md")[2].splitlines() if line.startswith("optimizer = ")]
    ours, _, theirs = line.partition("  # was ")
    torch_line = ours.replace("LearnedOptimizer", theirs).replace("model.parameters()", "[torch.zeros(2)]")
    names = {"torch": torch}
    exec(torch_line, names)
    assert type(names["optimizer"]) is torch.optim.AdamW


def test_every_link_of_the_readme_leads_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(targets) > 15
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_figure_is_the_one_in_docs_results():
    """Byte for byte: `scripts/figures` takes each figure from a result file by its key."""
    done = subprocess.run([sys.executable, ROOT / "scripts" / "figures", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"run scripts/figures, or edit docs/results/*.md.j2\n{done.stdout}{done.stderr}"


FIGURES = {
    "README.md": ["111.77", "[0.3907, 0.4850]", "499,188", "0.773"],
    "docs/results.md": ["111.77", "0.963", "[0.0242, 0.0311]", "2,412.07", "499,188", "57k"],
    "docs/guide/streams.md": ["862.98"],
}


@pytest.fixture
def twin(tmp_path):
    """A copy of what scripts/figures reads and writes, to falsify."""
    for folder in ("docs", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def check(twin):
    return subprocess.run([sys.executable, twin / "scripts" / "figures", "--check"], capture_output=True, text=True)


@pytest.mark.parametrize(("page", "figure"), [(page, figure) for page, found in FIGURES.items() for figure in found])
def test_one_wrong_digit_among_the_figures_is_found(page, figure, twin):
    digit = re.search(r"\d", figure[::-1])
    place = PAGES[page].index(figure) + len(figure) - 1 - digit.start()
    wrong = PAGES[page][:place] + str((int(PAGES[page][place]) + 1) % 10) + PAGES[page][place + 1 :]
    (twin / page).write_text(wrong, encoding="utf-8")
    done = check(twin)
    assert done.returncode == 1
    assert page in done.stdout


def test_a_page_that_has_lost_its_marks_is_found(twin):
    page = twin / "docs/results.md"
    page.write_text(page.read_text(encoding="utf-8").replace("<!-- end of figures -->", ""), encoding="utf-8")
    done = check(twin)
    assert done.returncode == 1
    assert "no page shows results" in done.stderr


@pytest.mark.skipif(not os.environ.get("CI"), reason="other releases in the ranges are welcome outside of CI")
def test_torch_is_the_tested_one():
    pinned = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert torch.__version__.split("+")[0] == pinned.group(1)
