"""``--workers N``: the processes of one command on this machine, which end together.

Not torchrun's launcher: that one answers Ctrl-C with a signal of its own, which cuts off the step that is to be saved,
and says many lines where one is due.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from dynlm.cli.terminal import tell
from dynlm.interrupt import Interruptible

LAUNCHED = "DYNLM_PARENT_PIPE"
"""names the end of a pipe that closes when the process that launched this one ends, in whatever way"""
LOST = 75
"""exit code of a process that has lost another one, and is not the one to tell of it"""
POLL = 0.05
"""seconds between looks at the processes"""
GRACE = 10.0
"""seconds that the main process has to say what is wrong, after another one has ended"""


def launch(arguments: Sequence[str], workers: int) -> int:
    """Run ``dynlm ARGUMENTS`` in as many processes, which find each other by torchrun's environment.

    Signals go to the main process alone, which ends the others with it. Returns the exit code.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reading_end, writing_end = os.pipe()
    command, processes = [sys.executable, "-m", "dynlm", *arguments], list[subprocess.Popen[bytes]]()
    with tempfile.TemporaryFile() as said:  # by workers: the main process speaks for all, while it lives
        try:
            for rank, environment in enumerate(environments(workers, store.port)):
                process = subprocess.Popen(
                    command,
                    env={**os.environ, **environment, LAUNCHED: str(reading_end)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL if rank else None,
                    stderr=said if rank else None,
                    pass_fds=[reading_end],
                    process_group=0,
                )
                processes.append(process)
            with _forwarding(processes[0]):
                ended = _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for end in (reading_end, writing_end):
                os.close(end)
        if ended is None:
            return processes[0].returncode
        said.seek(0)
        last = said.read().decode(errors="replace").strip().rpartition("\n")[2].removeprefix("dynlm: ")
    code = processes[ended].returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    reason = f" ({last})" if last and ended and code > 0 else ""
    tell(f"process {ended + 1} of {workers} {how}{reason}, and the others with it: --resume goes on with what was kept")
    return 128 - code if code < 0 else code


def environments(workers: int, port: int) -> list[dict[str, str]]:
    """Return what each process must find in its environment, as torchrun sets it, to meet the others at ``port``."""
    shared = {
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # who launches them keeps the store
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:  # nobody else may connect
        shared["GLOO_SOCKET_IFNAME"] = loopback[0]
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(workers)]


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until the main process has ended and said why, or return the number of one that must be told of."""
    main, *others = processes
    until = None
    while main.poll() is None:
        time.sleep(POLL)
        failed = _failed(others)
        if failed is not None:
            until = until or time.monotonic() + GRACE
            if others[failed].returncode < 0 or time.monotonic() > until:
                return failed + 1
    if main.returncode < 0:
        return 0
    if main.returncode != LOST:
        return None
    time.sleep(4 * POLL)  # a lost connection may be seen before the end of the process
    failed = _failed(others)
    return 0 if failed is None else failed + 1


def _failed(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Return the first that has failed, and not by losing another."""
    return next((i for i, process in enumerate(processes) if process.poll() not in (None, 0, LOST)), None)


@contextlib.contextmanager
def _forwarding(main: subprocess.Popen[bytes]) -> Iterator[None]:
    """Inside, signals that end a process go to the main one, which finishes its step first."""

    class Forwarding(Interruptible):
        def _note(self, number: int, frame: FrameType | None) -> None:
            main.send_signal(number)

    with Forwarding():
        yield


def end_with_parent() -> None:
    """End this process when the one that launched it ends, also by SIGKILL, which closes its end of the pipe."""
    if LAUNCHED in os.environ:
        threading.Thread(target=_end_with, args=(int(os.environ[LAUNCHED]),), daemon=True).start()


def _end_with(reading_end: int) -> None:
    os.read(reading_end, 1)
    os._exit(LOST)
