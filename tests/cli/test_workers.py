"""``--workers``: processes that share a command end together; what they leave is whole, and ``--resume`` goes on."""

import os
import signal
import subprocess
import threading
import time

import pytest
import torch

from dynlm.cli import launch
from dynlm.cli.main import main
from dynlm.files import read_json, read_tensors
from dynlm.runs import Run


@pytest.fixture
def started(monkeypatch):
    """The processes that are launched."""
    processes = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            processes.append(self)

    monkeypatch.setattr(launch.subprocess, "Popen", Recorded)
    return processes


def test_a_killed_process_ends_the_command_and_resuming_gives_what_one_process_gives(finished, copy, started, capfd):
    before, run = Run(finished[1]), Run(copy[1])
    flags = ["evaluate", "--run", str(run.path), "--workers", "2", "--evaluate.methods", "static", "rms"]
    part = run.parts("evaluate") / "static.safetensors"

    def kill():
        while not part.exists():
            time.sleep(0.01)
        started[1].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert main([*flags, "--overwrite"]) == 128 + signal.SIGKILL
    killer.join()
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("dynlm: ")] == [
        "dynlm: process 2 of 2 was ended by SIGKILL, and the others with it: --resume goes on with what was kept"
    ]
    assert not any("Traceback" in line for line in said)
    assert all(process.poll() is not None for process in started)
    assert main([*flags, "--resume"]) == 0
    assert "static: kept as it was read before" in capfd.readouterr().out
    results, whole = read_json(run.results), read_json(before.results)
    assert list(results["methods"]) == ["static", "rms"]
    for name, method in results["methods"].items():
        assert {**method, "tokens_per_s": 0} == {**whole["methods"][name], "tokens_per_s": 0}
    losses, alone = read_tensors(run.losses)[0], read_tensors(before.losses)[0]
    assert {"losses/static", "losses/rms", "gates/rms"} <= losses.keys() <= alone.keys()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in losses.items())
    assert sorted(os.listdir(run.path)) == sorted(os.listdir(before.path))


def test_what_has_nothing_to_share_is_refused(copy, capfd):
    assert main(["audit", "--run", str(copy[1]), "--workers", "2"]) == 2
    assert "`dynlm audit` works in one process" in capfd.readouterr().err
