"""Base training: it learns, resumes bit for bit, and refuses what cannot work."""

import copy
import json
import signal
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from dynlm.interrupt import Interrupted
from dynlm.models import train
from dynlm.models.lstm import LSTMForCausalLM, ModelConfig
from dynlm.models.train import TrainConfig, _Trainer, choose_precision, cycle, train_base_model
from dynlm.runs import Run
from dynlm.types import InputError
from lab import START, VOCAB, make_article
from support.together import together

CONFIG = TrainConfig(epochs=2, batch_size=4, segment=10, lr=2e-2, validations_per_epoch=2, precision="fp32")
ARTICLES = ([make_article(300, seed=1) for _ in range(4)], [make_article(300, seed=1)])


def ignore(model, new):
    pass


def build():
    return ModelConfig(embedding_size=8, hidden_size=8, input_dropout=0.2).build(VOCAB, START, seed=0)


def test_training_learns_and_keeps_the_best_model(tmp_path):
    best = []
    config = replace(CONFIG, epochs=6)
    progress = train_base_model(
        build(), ARTICLES, config, Run(tmp_path), lambda m, new: best.append(copy.deepcopy(m.state_dict()))
    )
    assert progress.best < 2.4  # ln 23 = 3.1 before
    model = build()
    model.load_state_dict(best[-1])
    nats = train_base_model(model, ARTICLES, replace(config, lr=0.0, epochs=1), Run(tmp_path / "again"), ignore).best
    assert nats == pytest.approx(progress.best)  # a rate of zero leaves it as it was


@pytest.mark.parametrize(("most", "steps"), [(7, 7), (10_000, 60), (0, 60)])
def test_training_ends_after_max_steps_and_its_rate_with_it(tmp_path, most, steps):
    trainer = _Trainer(build(), ARTICLES, replace(CONFIG, max_steps=most), Accelerator(cpu=True))
    rates = [trainer.optimizer.param_groups[0]["lr"] for _ in trainer.steps()]
    assert trainer.steps_per_epoch == 30
    assert len(rates) == trainer.progress.step == steps
    assert rates[-1] == pytest.approx(CONFIG.lr * cycle((steps - 1) / steps))


def test_an_interrupted_training_resumes_bit_for_bit(tmp_path, monkeypatch):
    straight, config = build(), replace(CONFIG, reset=0.1)
    train_base_model(straight, ARTICLES, config, Run(tmp_path / "straight"), ignore)

    class StopError(Exception):
        pass

    write, calls = train.write_tensors, []

    def stop_within_the_third(path, tensors, meta=None):
        write(path, tensors, meta)
        calls.append(path)
        if len(calls) == 3:
            raise StopError

    monkeypatch.setattr(train, "write_tensors", stop_within_the_third)
    with pytest.raises(StopError):
        train_base_model(build(), ARTICLES, config, Run(tmp_path / "cut"), ignore)
    monkeypatch.undo()
    torch.manual_seed(77)  # whatever happened in between
    resumed = build()
    train_base_model(resumed, ARTICLES, config, Run(tmp_path / "cut"), ignore, resume=True)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_precision_follows_the_recipe_or_the_device(monkeypatch):
    assert choose_precision(replace(CONFIG, precision="bf16")) == ("bf16", "train.precision")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for amx, avx, expected in ((True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert choose_precision(replace(CONFIG, precision="auto"))[0] == expected


def test_streams_begin_anew_as_often_as_asked(tmp_path, monkeypatch):
    seen, step = [], LSTMForCausalLM.forward

    def noted(model, *arguments, hidden=None, targets=None, **more):
        if model.training and hidden is not None:
            seen.append(torch.cat([(h == 0).all(1) for h, _ in hidden]))
        return step(model, *arguments, hidden=hidden, targets=targets, **more)

    monkeypatch.setattr(LSTMForCausalLM, "forward", noted)
    for share in (0.0, 0.25, 0.9):
        seen.clear()
        train_base_model(build(), ARTICLES, replace(CONFIG, reset=share), Run(tmp_path / str(share)), ignore)
        assert torch.cat(seen).float().mean().item() == pytest.approx(share, abs=0.1)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train_base_model(build(), ARTICLES, CONFIG, Run(tmp_path), ignore)
    with pytest.raises(InputError, match=r"other \[train\] settings"):
        train_base_model(build(), ARTICLES, replace(CONFIG, lr=1.0), Run(tmp_path), ignore, resume=True)
    other = ModelConfig(embedding_size=10, hidden_size=10).build(VOCAB, START, seed=0)
    with pytest.raises(InputError, match="does not fit this model"):
        train_base_model(other, ARTICLES, CONFIG, Run(tmp_path), ignore, resume=True)


def test_a_loss_that_runs_away_stops_before_anything_is_saved(tmp_path):
    broken, saved = build(), []
    broken.lm_head.bias.data[3] = float("nan")
    with pytest.raises(InputError, match=r"training loss is nan at step 0: lower lr"):
        train_base_model(broken, ARTICLES, CONFIG, Run(tmp_path / "run"), lambda *_: saved.append(1))
    assert not saved
    assert not (tmp_path / "run").exists()


def test_learning_rate_cycle():
    assert cycle(0.0) == 0.01
    assert cycle(0.1) == pytest.approx(1.0)
    assert cycle(1.0) == pytest.approx(0.0)
    assert all(cycle(x / 100) >= cycle((x + 1) / 100) for x in range(10, 100))


def test_a_signal_leaves_no_validation_out(tmp_path, monkeypatch):
    straight = build()
    train_base_model(straight, ARTICLES, CONFIG, Run(tmp_path / "straight"), ignore)
    steps = [json.loads(line)["step"] for line in Run(tmp_path / "straight").log("train").read_text().splitlines()]
    run, step = Run(tmp_path / "cut"), _Trainer._step

    def interrupted(self, window):
        if self.progress.step + 1 == steps[1]:
            signal.raise_signal(signal.SIGINT)
        return step(self, window)

    monkeypatch.setattr(_Trainer, "_step", interrupted)
    with pytest.raises(Interrupted):
        train_base_model(build(), ARTICLES, CONFIG, run, ignore)
    monkeypatch.undo()
    resumed = build()
    train_base_model(resumed, ARTICLES, CONFIG, run, ignore, resume=True)
    assert [json.loads(line)["step"] for line in run.log("train").read_text().splitlines()] == steps
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_two_processes_train_together_and_resume_bit_for_bit(tmp_path):
    config = replace(CONFIG, reset=0.1)

    def work(name, most=0, resume=False):
        AcceleratorState._reset_state(True)  # of this test's own process, which others are forked from
        GradientState._reset_state()
        model, run = build(), Run(tmp_path / name)
        steps = _Trainer.steps

        def cut(trainer):
            for loss in steps(trainer):
                if trainer.progress.step == most:
                    signal.raise_signal(signal.SIGINT)
                yield loss

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Trainer, "steps", cut)
            try:
                train_base_model(model, ARTICLES, config, run, ignore, resume)
            except Interrupted as error:
                return str(error)
        return AcceleratorState().num_processes, [p.detach() for p in model.parameters()]

    (n, straight), (_, other) = together(lambda: work("straight"))
    assert n == 2
    assert all(map(torch.equal, straight, other))
    assert (
        together(lambda: work("cut", 20))
        == ["interrupted after step 20, which is saved: --resume goes on from there"] * 2
    )
    with pytest.raises(InputError, match="was made by 2 processes, not by 1: resume with as many"):
        work("cut", resume=True)
    for resumed in together(lambda: work("cut", resume=True)):
        assert all(map(torch.equal, resumed[1], straight))
