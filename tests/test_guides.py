"""What the documentation shows is true of the code: every block of Python is run, every command is parsed."""

import dataclasses
import json
import re
import shutil
import tomllib
from pathlib import Path
from unittest import mock

import pytest
import torch
import tyro

import dynlm
from dynlm.cli.main import COMMANDS, parse
from dynlm.cli.read import ReadSettings
from dynlm.cli.versus import VersusSettings
from dynlm.meta.replay import Replay
from dynlm.optim.registry import tuned
from dynlm.stages.recipe import Recipe
from golden import text
from lab import make_article, make_lab, make_transformer_lab
from support.pages import LIVING, PAGES, ROOT, RUN, blocks, commands, run, runs
from support.windows import gradients, read_window

SHORT = {"trials": "2", "steps": "2, articles=1, truncation=4, validation_articles=1"}
"""settings that tests read in place of a guide's"""


def make_articles(numbers):
    return [dynlm.Article(str(i), f"Text {i}", text(i, 60)) for i in numbers]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def beside(ready, here):
    """A working folder with my-model in it."""
    shutil.copytree(ready[1], here / "my-model")
    return here


@runs("docs/quickstart.md")
def test_the_quick_start_reads(here):
    (here / "my-text.txt").write_text(text(8, 120))
    assert run("docs/quickstart.md", {})["reading"].gain > 0
    assert (here / "page.html").read_text().endswith("</html>")


@runs("docs/guide/read.md")
def test_the_guide_to_reading_reads_generates_and_goes_on_from_a_memory(here):
    names = run("docs/guide/read.md", {"text": text(8, 120), "prompt": torch.tensor([[5]])})
    assert names["reading"].gain > 0
    assert (here / "page.html").read_text().endswith("</html>")
    assert names["distributions"].exp().sum(1).allclose(torch.ones(len(names["step"].texts)))
    assert all(float(distance) > 0 for distance in names["moved"].values())
    assert 1 < names["words"].shape[1] <= 21  # an end of text may come before
    assert names["again"].read_from == "memory.safetensors"
    assert dynlm.load_model(here / "read-model").num_parameters() == names["model"].num_parameters()


@runs("docs/guide/evaluate.md")
def test_the_guide_to_evaluation_compares_meta_trains_and_audits(beside):
    for number, name in enumerate(("a.txt", "b.txt", "c.txt")):
        Path(name).write_text(text(number, 80))
    rows = [{"title": str(i), "text": text(i, 60)} for i in range(5, 9)]
    Path("to-tune-on.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = run("docs/guide/evaluate.md", {}, **SHORT)
    assert sorted(names["results"].methods) == ["rms", "sgd", "static"]
    assert len(names["results"].articles) == 3
    assert Path("report/report.html").is_file()
    assert Path("report/evaluate/results.json").is_file()
    assert names["gated"].made["start"] == names["rms"].settings()


@runs("docs/guide/meta-train.md")
def test_the_guide_to_meta_training_trains_saves_and_shares_a_rule(beside):
    names = {"articles": make_articles(range(4)), "held_out": make_articles(range(4, 6))}
    with (
        mock.patch("huggingface_hub.HfApi") as api,
        mock.patch("huggingface_hub.hf_hub_download", return_value="my-rule/rule.safetensors"),
    ):
        run("docs/guide/meta-train.md", names, **SHORT)
    assert api().upload_folder.call_args.kwargs["repo_id"] == "user/my-rule"
    assert "license: cc-by-sa-4.0" in Path("my-rule/README.md").read_text()
    assert Path("meta/rules/gated.safetensors").is_file()
    assert names["shared"].state_dict().keys() == names["gated"].state_dict().keys()


@runs("docs/guide/rule.md")
def test_the_rule_of_the_guide_gets_a_meta_gradient_and_is_tuned(own_rules):
    names = {"articles": make_articles(range(3)), "held_out": make_articles(range(3, 5))}
    names["reader"] = dynlm.Reader.from_pretrained()
    run("docs/guide/rule.md", names, trials="2")
    rule = names["SignDescent"](1e-2)
    recording, *_ = read_window(make_lab(), rule, 30)
    Replay(rule)(recording)
    assert gradients(rule)["lr"] != 0
    assert tuned()[-1] == "sign"
    assert names["sign"].made["nats_per_token"] < names["sign"].made["static_nats_per_token"]


@runs("docs/guide/lora.md")
def test_the_guide_to_lora_adapts_what_it_names(beside):
    names = run("docs/guide/lora.md", {"text": text(8, 60)})
    assert [prior.name.split(".")[-3:] for prior in names["reader"].session.priors] == [
        ["mlp", "c_proj", part] for _ in range(2) for part in ("weight", "bias")
    ]
    assert all(".lora_" in prior.name for prior in names["low_rank"].session.priors)


@runs("docs/guide/optimizer.md", 0, 2)
def test_the_training_loop_of_the_guide_learns():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 32, 64, generator=generator)
    batches = [(x, x[:, :10].argmax(1)) for x in inputs]
    torch.manual_seed(0)
    names = run("docs/guide/optimizer.md", {"batches": batches}, 0)
    with torch.no_grad():
        logits = names["model"](inputs[-1])
    assert torch.nn.functional.cross_entropy(logits, batches[-1][1]) < 1.5  # from ln 10 = 2.3
    run("docs/guide/optimizer.md", names, 2)


@runs("docs/guide/optimizer.md", 1)
def test_the_trainer_of_the_guide_trains(tmp_path):
    model, *_ = make_transformer_lab(torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    ids = make_article(16 * 16).ids_T.view(16, 16)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    names = {"model": model, "folder": str(tmp_path), "train_dataset": rows}
    code = blocks("docs/guide/optimizer.md")[1]
    exec(code.replace("report_to=[]", 'report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True'), names)
    losses = [record["train_loss"] for record in names["trainer"].state.log_history if "train_loss" in record]
    assert losses[0] < 3.1  # from ln 23
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@runs("docs/guide/streams.md")
def test_the_stream_of_the_guide_goes_on_over_its_chunks(here):
    names = run("docs/guide/streams.md", {"chunks": [text(8, 100)] * 3})
    assert names["reading"].totals.articles == 3
    assert names["reading"].gain > 0.5  # the same text again, and nothing is forgotten
    assert (here / "stream.safetensors").is_file()


@runs("docs/guide/programs.md")
def test_other_programs_open_a_run(finished, here):
    Path("runs").mkdir()
    Path("runs/mine").symlink_to(finished[1])
    names = run("docs/guide/programs.md", {})
    assert names["model"].num_parameters() > 0
    assert list(names["curve"].columns) == ["step", "train", "valid", "seconds"]
    assert names["gain"].numel() == names["results"]["tokens"]


@runs("docs/guide/engines.md")
def test_the_engines_of_the_guide_train_a_rule():
    torch.manual_seed(0)
    names = run("docs/guide/engines.md", {})
    still = [name for name, g in gradients(names["rule"]).items() if not g.abs().max() > 0]
    assert still in ([], ["log2_decay"])  # where FLUSH is shut, decay moves nothing
    assert names["window"].nats / names["window"].tokens < 3  # from ln 50 = 3.9
    assert names["unrolled"].means[-1] < names["unrolled"].means[0]
    assert [a.parameter for a in names["adapted"]] == list(names["model"].parameters())


def test_every_block_of_every_page_is_run():
    there = {page: set(range(len(blocks(page)))) for page in PAGES if page != "README.md" and blocks(page)}
    assert there == {page: numbers for page, numbers in RUN.items() if page != "README.md"}


@pytest.mark.parametrize("page", LIVING)
def test_every_command_is_one_with_settings_that_there_are(page, here, capsys):
    Path("recipes").symlink_to(ROOT / "recipes")
    Path("mine.toml").touch()
    for name, *flags in commands(page):
        if name in ("env", "--version"):
            continue
        assert name in COMMANDS, name
        if name == "read":
            tyro.cli(ReadSettings, args=flags)
        elif name == "report" and not any(flag.startswith("-") for flag in flags[:2]) and len(flags) > 1:
            tyro.cli(VersusSettings, args=flags)
        elif "--tyro-print-completion" in flags:
            with pytest.raises(SystemExit) as ended:
                parse(name, flags)
            assert not ended.value.code
        elif not {"--help", "--help-all"} & set(flags):
            parse(name, flags)


@pytest.mark.parametrize("page", LIVING)
def test_files_that_a_page_names_exist(page):
    paths = re.findall(r"(?<![\w/.-])((?:scripts|recipes|tests|dynlm)/[\w/-]+(?:\.\w+)*)", LIVING[page])
    assert [path for path in paths if not (ROOT / path).exists() and path != "dynlm/recipes"] == []


@pytest.mark.parametrize("page", LIVING)
def test_extras_that_a_page_names_exist(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"dynlm\[([\w-]+)\]", LIVING[page])) <= set(extras)


def test_the_site_asks_the_network_for_nothing():
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings
    assert "://" not in settings


ENTRIES = {name: page for page in PAGES for name in re.findall(r"^::: ([\w.]+)", PAGES[page], re.MULTILINE)}
ALIASES = {a: b for page in PAGES for a, b in re.findall(r"`([\w.]+)` is \[`[\w.]+`\]\[([\w.]+)\]", PAGES[page])}


def test_every_public_name_has_an_entry_in_the_reference():
    written = Path(__file__).with_name("public_names.txt").read_text().splitlines()
    names = [re.match(r"[\w.]+", line).group() for line in written]
    names += [f"dynlm.rules.{name}" for name in dynlm.rules.__all__]
    assert len(names) > 25
    assert [name for name in names if ALIASES.get(name, name) not in ENTRIES] == []


def test_every_table_of_settings_has_an_entry_in_the_reference():
    def tables(config):
        yield type(config)
        for field in dataclasses.fields(config):
            if dataclasses.is_dataclass(value := getattr(config, field.name)):
                yield from tables(value)

    names = {f"{table.__module__}.{table.__qualname__}" for table in [*tables(Recipe()), ReadSettings]}
    assert names - ENTRIES.keys() == set()


def test_every_command_has_a_row_in_the_reference():
    page = PAGES["docs/reference/commands.md"]
    rows = re.findall(r"^\| `dynlm ([\w-]+)` \| (.*?) \|.*?(yes)? \|$", page, re.MULTILINE)
    told = {name: (description, bool(resumes)) for name, description, resumes in rows if name != "env"}
    assert told == {name: (command.description, command.resumes) for name, command in COMMANDS.items()}
