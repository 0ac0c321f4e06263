"""Tables to paste hold the figures of results.json, in the words of each language."""

import csv
import io

import pytest

from dynlm.cli.main import main
from dynlm.report.tables import CSV, table
from dynlm.results import load_results
from dynlm.types import InputError
from support.evaluations import FakeRun


@pytest.fixture
def run(tmp_path):
    made = FakeRun(tmp_path / "run", ["static", "rms", "my_rule"], articles=9, reset="article")
    made.value["methods"]["my_rule"]["gain_ci95"] = [-0.5, None]
    made.value["methods"]["rms"]["gain_ci95"] = [-0.01234, 0.5]
    made.value["methods"]["static"]["word_ppl"] = 1234567.891
    made.value["methods"]["static"]["bits_per_byte"] = None
    made.save()
    return made


def test_a_table_in_markdown(run):
    lines = table(load_results(run.results), "markdown").splitlines()
    assert lines[0] == "| method | word perplexity | bits per byte | gain over static, nats per token [95 %] |"
    assert lines[1] == "|---|---|---|---|"
    assert lines[2] == "| static | 1,234,567.89 | – |  |"
    rms, last = run.value["methods"]["rms"], run.value["methods"]["my_rule"]
    figures = f"{rms['word_ppl']:,.2f} | {rms['bits_per_byte']:.4f} | {rms['gain_nats_per_token']:.4f}"
    assert lines[3] == f"| rms | {figures} [-0.0123, 0.5000] |"
    assert lines[4].startswith("| my_rule | ")
    assert lines[4].endswith(f"{last['gain_nats_per_token']:.4f} |")


def test_a_table_in_latex(run):
    text = table(load_results(run.results), "latex")
    assert text.startswith("\\begin{tabular}{lrrl}\n\\toprule\nmethod & ")
    assert text.endswith("\\bottomrule\n\\end{tabular}\n")
    assert "[95 \\%] \\\\\n\\midrule\nstatic & 1,234,567.89 & – &  \\\\\n" in text
    assert "[$-$0.0123, 0.5000] \\\\\n" in text
    assert "\nmy\\_rule & " in text


def test_a_table_of_every_digit(run):
    head, *rows = csv.reader(io.StringIO(table(load_results(run.results), "csv")))
    assert tuple(head) == CSV
    assert [row[0] for row in rows] == ["static", "rms", "my_rule"]
    assert float(rows[1][4]) == run.value["methods"]["rms"]["gain_nats_per_token"]
    assert rows[1][5:7] == ["-0.01234", "0.5"]
    assert rows[2][5:7] == ["-0.5", ""]
    assert rows[0][3] == ""


def test_an_unknown_form_is_one_line(run):
    with pytest.raises(InputError, match="no table of the form 'html': choose from markdown, latex, csv"):
        table(load_results(run.results), "html")


@pytest.mark.usefixtures("plain_reports")
def test_the_command_prints_it(run, capsys):
    assert main(["report", "--run", str(run.path), "--table", "markdown"]) == 0
    assert "| my_rule | " in capsys.readouterr().out
