"""A headless Chromium, spoken to over a pipe in the DevTools protocol: what it shows, asks for and complains about."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
PATIENCE = 120.0  # seconds: a busy machine starts it slowly


def find() -> str | None:
    """The browser on PATH, if there is one."""
    return next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)


class NoBrowser(Exception):  # noqa: N818 (said to pytest.skip)
    """A browser that is there and does not start."""


class Browser:
    """One page of a browser. ``complaints`` are console errors, exceptions and refusals of the page's policy;
    ``requests`` the addresses that it asked for."""

    def __init__(self, profile: Path, width: int = 1000, height: int = 900) -> None:
        self.profile, self.size = profile, (width, height)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._number, self._left, self._session = 0, b"", ""

    def __enter__(self) -> Browser:
        command_read, self._write = os.pipe()
        self._read, answer_write = os.pipe()
        # the browser reads from descriptor 3 and writes to 4
        script = f'exec "$0" "$@" 3<&{command_read} 4>&{answer_write}'
        command = ["bash", "-c", script, str(find()), *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(command_read, answer_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(command_read)
        os.close(answer_write)
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Runtime", "Log", "Network", "Page"):
                self.call(f"{domain}.enable")
            self.resize(*self.size)
        except (EOFError, OSError) as error:
            self.close()
            raise NoBrowser(f"{find()} does not start: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a command; events that come before it are taken note of."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        ends = time.monotonic() + PATIENCE
        while True:
            answer = self._receive(ends)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._take_note(answer)

    def _receive(self, ends: float) -> dict[str, Any]:
        while b"\0" not in self._left:
            if not select.select([self._read], [], [], max(0.0, ends - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._read, 1 << 16)
            if not part:
                raise EOFError("the browser has gone")
            self._left += part
        message, self._left = self._left.split(b"\0", 1)
        received: dict[str, Any] = json.loads(message)
        return received

    def _take_note(self, event: dict[str, Any]) -> None:
        method, told = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])

    def open(self, path: Path) -> None:
        """Load a file and wait until it is there."""
        self.call("Page.navigate", url=path.as_uri())
        ends = time.monotonic() + PATIENCE
        while self.evaluate("location.href + document.readyState") != f"{path.as_uri()}complete":
            assert time.monotonic() < ends, "the page did not load"

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """``light`` or ``dark``, as the reader's system prefers it."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def hover(self, selector: str) -> None:
        """Scroll to the first element that fits, and move the mouse over it."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getClientRects()[0];"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
