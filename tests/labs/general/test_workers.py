"""Worker processes end with their parent, whatever ended it."""

import os
import signal
import subprocess
import sys

import pytest

from dynlm.labs.general.workers import make_workers

PARENT = """
import os, time
from dynlm.labs.general.workers import make_workers

def pid(delay):
    time.sleep(delay)
    return os.getpid()

workers = make_workers(2)
assert len(set(workers.map(pid, [0.5, 0.5]))) == 2
busy = [workers.submit(pid, 600)]  # the other one waits for work
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM])
def test_they_end_with_their_parent(ended_by):
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(ended_by)
        rest, _ = parent.communicate(timeout=30)  # until no process holds the other end, workers among them
        assert (rest, parent.returncode) == ("", -ended_by)


def test_they_work_and_leave_no_pipe_behind():
    before = set(os.listdir("/dev/fd"))
    with make_workers(2) as workers:
        assert list(workers.map(abs, [-1, -2, -3])) == [1, 2, 3]
    del workers
    assert len(os.listdir("/dev/fd")) <= len(before)
