"""LearnedOptimizer in the frameworks that it is made for: real runs, each of a few steps."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler as schedulers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from dynlm.optim import LearnedOptimizer
from dynlm.optim.gated import Gated, GatedConfig
from dynlm.optim.general import General
from dynlm.optim.handmade import SGD, Adam
from dynlm.optim.library import make_rule

RULES = {"adam": Adam(0.01), "gated": Gated(GatedConfig(lr=0.003)), "general": General()}
for_rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


pytestmark = pytest.mark.usefixtures("eager")


def make_net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def make_data(n=48):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.TensorDataset(x, x[:, :1] * x[:, 1:2])


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def same(a, b):
    for (name, x), (other, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(x, y), (name, other)


# transformers


class Stop(TrainerCallback):
    """Ends a training early, as a crash would, with its checkpoint written."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def make_trainer(folder, rule, stop=None, **settings):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ids = torch.randint(13, (24, 8), generator=torch.Generator().manual_seed(2))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        save_steps=3,
        save_strategy="steps",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        weight_decay=0.01,
        warmup_steps=2,
        seed=5,
    )
    return Trainer(
        model=GPT2LMHeadModel(config),
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        optimizer_cls_and_kwargs=(LearnedOptimizer, {"rule": rule, **settings}),
        callbacks=[Stop(stop)] if stop else [],
    )


@for_rules
def test_trainer_resumes_bitwise_from_a_checkpoint(rule, tmp_path, capsys):
    whole = make_trainer(tmp_path / "whole", rule)
    start = copy.deepcopy(whole.model)
    result = whole.train()
    assert result.global_step == 6
    assert math.isfinite(result.training_loss)
    assert not torch.equal(start.lm_head.weight, whole.model.lm_head.weight)
    make_trainer(tmp_path / "cut", rule, stop=3).train()
    again = make_trainer(tmp_path / "cut", rule)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    same(again.model, whole.model)
    optimizer = again.optimizer.optimizer
    assert isinstance(optimizer, LearnedOptimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert {state["step"] for state in optimizer.state.values()} == {6}


def test_trainer_takes_further_settings(tmp_path, capsys):
    trainer = make_trainer(tmp_path, RULES["general"], lr=0.5, state_dtype=torch.bfloat16)
    trainer.train()
    state = next(iter(trainer.optimizer.state.values()))
    assert state["slot0"].dtype == torch.bfloat16
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 0.5


# accelerate


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps its state in classes."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def accelerated(rule, folder=None, save_at=None, load=False, accumulate=2):
    """A training of 6 batches; with ``load`` only the part after ``save_at``."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = make_net()
    optimizer = LearnedOptimizer(model.parameters(), rule)
    scheduler = schedulers.LambdaLR(optimizer, lambda step: 0.9**step)
    loader = torch.utils.data.DataLoader(make_data(), batch_size=8)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if load:
        accelerator.load_state(folder)
    for number, (x, y) in enumerate(loader):
        if load and number < save_at:
            continue
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x, y))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if folder and not load and number + 1 == save_at:
            accelerator.save_state(folder)
    return model, optimizer


@for_rules
def test_accelerate_resumes_bitwise_and_skips_while_it_accumulates(rule, tmp_path, fresh_accelerate):
    whole, optimizer = accelerated(rule, str(tmp_path), 4)
    assert {state["step"] for state in optimizer.state.values()} == {3}  # six batches, two a step
    again, resumed = accelerated(rule, str(tmp_path), 4, load=True)
    same(again, whole)
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_accelerate_skips_a_step_on_an_overflow(fresh_accelerate):
    accelerator = Accelerator(cpu=True)
    model = make_net()
    optimizer = accelerator.prepare(LearnedOptimizer(model.parameters(), RULES["general"]))
    optimizer.scaler = torch.amp.GradScaler(device="cpu", init_scale=8.0)
    optimizer.__setstate__(optimizer.__getstate__())  # wraps the step as it does with its own scaler
    (x, y) = make_data().tensors
    skipped = []
    for number in range(3):
        optimizer.zero_grad()
        before = copy.deepcopy(model)
        optimizer.scaler.scale(loss_of(model, x, y)).backward()
        if number == 1:
            model[0].weight.grad[0, 0] = math.inf
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
        assert torch.equal(model[0].weight, before[0].weight) == skipped[-1]
    assert skipped == [False, True, False]
    assert optimizer.state[model[0].weight]["step"] == 2


# torch: compiled and distributed models, distributed checkpoints, loops with closures, schedulers


def train(model, optimizer, steps=4, scheduler=None):
    x, y = make_data().tensors
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


@for_rules
def test_a_compiled_model_learns_as_it_does_without(rule):
    model, plain = make_net(), make_net()
    compiled = torch.compile(model, backend="eager")
    train(compiled, LearnedOptimizer(compiled.named_parameters(), rule))
    train(plain, LearnedOptimizer(plain.named_parameters(), rule))
    same(model, plain)


@for_rules
def test_a_distributed_model_learns_as_it_does_alone(rule, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, plain = make_net(), make_net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        train(wrapped, LearnedOptimizer(wrapped.named_parameters(), rule))
    finally:
        torch.distributed.destroy_process_group()
    train(plain, LearnedOptimizer(plain.named_parameters(), rule))
    same(model, plain)


WORKER = """
import sys, torch
from torch import nn
from dynlm.optim import LearnedOptimizer
from dynlm.optim.general import General

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
x, y, weights = torch.load(f"{folder}/start.pt")
net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
net.load_state_dict(weights)
model = nn.parallel.DistributedDataParallel(net)
optimizer = LearnedOptimizer(model.named_parameters(), General())
for _ in range(3):
    optimizer.zero_grad()
    (model(x[rank::2]) - y[rank::2]).square().mean().backward()
    optimizer.step()
torch.save(net.state_dict(), f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_stay_alike_and_learn_from_both_halves(tmp_path):
    torch.save((*make_data().tensors, make_net().state_dict()), tmp_path / "start.pt")
    commands = [[sys.executable, "-c", WORKER, str(rank), str(tmp_path)] for rank in range(2)]
    workers = [subprocess.Popen(command) for command in commands]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    plain = make_net()
    train(plain, LearnedOptimizer(plain.named_parameters(), General()), steps=3)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)


@for_rules
def test_distributed_checkpoints_carry_the_state(rule):
    model, other = make_net(), make_net()
    optimizer = LearnedOptimizer(model.parameters(), rule)
    train(model, optimizer)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    other.load_state_dict(model.state_dict())
    resumed = LearnedOptimizer(other.parameters(), rule)
    set_optimizer_state_dict(other, resumed, saved)
    train(model, optimizer)
    train(other, resumed)
    same(other, model)


@for_rules
def test_a_loop_that_gives_a_closure_as_lightning_does(rule):
    model, plain = make_net(), make_net()
    optimizer = LearnedOptimizer(model.parameters(), rule)
    x, y = make_data().tensors

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(4)]
    other = LearnedOptimizer(plain.parameters(), rule)
    for expected in losses:
        other.zero_grad()
        loss = loss_of(plain, x, y)
        loss.backward()
        assert float(loss.detach()) == expected
        other.step(lambda loss=loss: loss.detach())
    same(model, plain)
    assert optimizer.param_groups[0]["loss"] == losses[-1]


SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 6, power=2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 1.0, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1.0, total_steps=8, cycle_momentum=False),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_move_the_rate_as_they_move_sgds(name):
    ours, theirs = make_net(dtype=torch.float64), make_net(dtype=torch.float64)
    pairs = []
    for model in (ours, theirs):
        own = model is ours
        optimizer = LearnedOptimizer(model.parameters(), SGD(1.0), lr=0.5) if own else None
        optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.5)
        pairs.append((model, optimizer, SCHEDULERS[name](optimizer)))
    x, y = (t.double() for t in make_data().tensors)
    rates = []
    for _ in range(6):
        for model, optimizer, scheduler in pairs:
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
            scheduler.step()
        rates.append([optimizer.param_groups[0]["lr"] for _, optimizer, _ in pairs])
    assert all(a == b for a, b in rates)
    assert len({a for a, _ in rates}) > 1
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_plateau_lowers_the_rate():
    model = make_net()
    optimizer = LearnedOptimizer(model.parameters(), make_rule("adam"))
    scheduler = schedulers.ReduceLROnPlateau(optimizer, patience=1)
    train(model, optimizer)
    for _ in range(4):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)  # from the 1e-3 of the rule


def test_averaged_weights_and_their_scheduler():
    model = make_net()
    optimizer = LearnedOptimizer(model.parameters(), make_rule("adam"))
    average = torch.optim.swa_utils.AveragedModel(model)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.25, anneal_epochs=2)
    train(model, optimizer, 3, scheduler)
    average.update_parameters(model)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)
    same(average.module, model)


def test_a_scheduler_and_optimizer_resume_together():
    def build(model):
        optimizer = LearnedOptimizer(model.parameters(), RULES["general"])
        return optimizer, schedulers.CosineAnnealingLR(optimizer, 8)

    model, other = make_net(), make_net()
    optimizer, scheduler = build(model)
    train(model, optimizer, 3, scheduler)
    other.load_state_dict(model.state_dict())
    resumed, its_scheduler = build(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    its_scheduler.load_state_dict(scheduler.state_dict())
    train(model, optimizer, 3, scheduler)
    train(other, resumed, 3, its_scheduler)
    same(other, model)
