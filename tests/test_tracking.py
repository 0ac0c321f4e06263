"""Trackers get every loss of every stage that trains, and one that is not there is one line."""

import json

import pytest
from accelerate import tracking as of_accelerate

import dynlm
from dynlm.cli.main import main
from dynlm.runs import Run
from dynlm.tracking import flat, tracking, untracked
from golden import text
from support.commands import fails


class Recorder(of_accelerate.GeneralTracker):
    """Keeps what it gets."""

    name = "recorder"
    requires_logging_directory = True

    def __init__(self, project, logging_dir=None):
        super().__init__()
        self.project, self.folder = project, logging_dir
        self.settings, self.figures, self.finished = {}, [], False

    @property
    def tracker(self):
        return self.figures

    def store_init_configuration(self, values):
        self.settings |= values

    def log(self, values, step=None, **more):
        self.figures += [(name, value, step) for name, value in values.items()]

    def finish(self):
        self.finished = True

    def steps(self, name):
        return [step for found, _, step in self.figures if found == name]


@pytest.fixture
def recorders(monkeypatch):
    """Those that commands make for ``--log-with recorder``."""
    made = []

    def make(*arguments, **more):
        made.append(Recorder(*arguments, **more))
        return made[-1]

    make.requires_logging_directory = True
    monkeypatch.setitem(of_accelerate.LOGGER_TYPE_TO_CLASS, "recorder", make)
    return made


def test_every_stage_that_trains_is_followed(copy, recorders):
    recipe, path = copy
    run, base = Run(path), [str(recipe), "--run", str(path), "--overwrite", "--log-with", "recorder"]
    short = ["--start.segments", "2", "--start.outer.steps", "2", "--start.outer.tasks", "1"]
    for command in (["meta-train", *base], ["learn-start", *base, *short], ["train", *base]):
        assert main(command) == 0
    meta, start, train = recorders
    assert all((r.finished, r.project, r.folder) == (True, "dynlm", run.trackers) for r in recorders)
    assert all(r.settings["meta.steps"] == 2 for r in recorders)
    assert (meta.steps("meta-train/valid"), meta.steps("meta-train/train")) == ([0, 1, 2], [1, 2])
    assert (start.steps("learn-start/valid"), start.steps("learn-start/train")) == ([0, 2], [1, 2])
    log = [json.loads(line) for line in run.log("train").read_text().splitlines()]
    assert train.steps("train/train") == list(range(1, log[-1]["step"] + 1))
    assert ("train/valid", log[-1]["valid"], log[-1]["step"]) in train.figures
    assert ("train/train", log[-1]["train"], log[-1]["step"]) in train.figures


def test_the_general_optimizer_is_followed_from_an_empty_folder(tmp_path, recorders):
    sizes = [
        "--general.steps",
        "2",
        "--general.pairs",
        "1",
        "--general.validation-tasks",
        "1",
    ]
    family = [
        "--general.family.families",
        "linear",
        "--general.family.min-steps",
        "5",
        "--general.family.max-steps",
        "8",
    ]
    command = ["learn-optimizer", "--run", str(tmp_path / "run"), *sizes, *family, "--log-with", "recorder"]
    assert main(command) == 0
    (recorder,) = recorders
    assert recorder.steps("learn-optimizer/valid") == [0, 2]
    assert recorder.steps("learn-optimizer/train") == [1, 2]
    assert recorder.settings["family.families"] == "['linear']"


def test_a_tracker_of_ones_own_follows_meta_training_in_python():
    recorder = Recorder("mine")
    reader = dynlm.Reader.from_pretrained("wikitext2", rule="rms")
    articles = [dynlm.Article(str(i), f"Text {i}", text(i, 60)) for i in range(4)]
    settings = {"steps": 1, "articles": 1, "truncation": 4, "validation_articles": 1}
    dynlm.meta_train(reader, articles, reader.rule, trackers=[recorder], **settings)
    assert recorder.steps("meta-train/train") == [1]
    assert recorder.steps("meta-train/valid") == [0, 1]
    assert recorder.settings["config.truncation"] == 4
    assert recorder.finished


def test_it_is_finished_when_training_fails(tmp_path):
    recorder = Recorder("mine")

    def train():
        with tracking([recorder], "train", tmp_path, {}) as track:
            track({"train": 0.5}, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert recorder.figures == [("train/train", 0.5, 1)]
    assert recorder.finished


def test_a_tracker_that_is_not_there_is_one_line_before_anything_is_done(tmp_path, capsys, monkeypatch):
    base = ["learn-optimizer", "--run", tmp_path / "run", "--log-with"]
    fails(capsys, [*base, "tensorbord"], "unknown tracker 'tensorbord': did you mean 'tensorboard'?")
    fails(capsys, [*base, "x"], "choose from aim, comet_ml")
    monkeypatch.setattr(of_accelerate, "_available_trackers", [])
    fails(capsys, [*base, "comet_ml"], "tracker 'comet_ml' is not installed: pip install comet-ml")
    assert not (tmp_path / "run").exists()
    fails(capsys, ["evaluate", "--run", tmp_path, "--log-with", "wandb"], "trains nothing", "--log-with")


def test_without_trackers_nothing_is_logged(tmp_path):
    with tracking((), "train", tmp_path / "none", {}) as track:
        assert track is untracked
        track({"train": 1.0}, 1)
    assert not (tmp_path / "none").exists()


def test_settings_are_flat_and_plain():
    settings = {"a": 1, "b": {"c": 0.5, "d": {"e": True}, "f": ["x", 2]}, "g": "text", "h": None}
    assert flat(settings) == {"a": 1, "b.c": 0.5, "b.d.e": True, "b.f": "['x', 2]", "g": "text", "h": "None"}
