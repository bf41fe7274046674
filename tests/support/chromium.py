"""A real browser without a window: Debian's Chromium, by its DevTools protocol over a pipe."""

import base64
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
"""Path of the command; None where it is not installed."""


class Tab:
    """A tab of the browser. Messages that it sends in between are kept.

    Attributes:
        errors: errors of scripts, and messages that scripts or the browser wrote into the console as errors.
        requests: addresses that the page has asked for, its own included.
    """

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._process, self._to, self._back = process, to, back
        self._waiting, self._number, self._session = b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser for something, and return its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answer = self._read(lambda said: said.get("id") == self._number)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a file in a window of this size in pixels, and wait until it is there."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        self._read(lambda said: said.get("method") == "Page.loadEventFired")

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self) -> bytes:
        """PNG of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def _read(self, wanted: Any) -> dict[str, Any]:
        while True:
            message, found, rest = self._waiting.partition(b"\0")
            if not found:
                part = os.read(self._back, 1 << 20)
                assert part, f"Chromium has ended with status {self._process.wait()}"
                self._waiting += part
                continue
            self._waiting = rest
            said = json.loads(message)
            self._note(said)
            if wanted(said):
                return said

    def _note(self, said: dict[str, Any]) -> None:
        about = said.get("params", {})
        match said.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(about["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if about["type"] in ("error", "assert", "warning"):
                self.errors.append(json.dumps(about["args"]))
            case "Log.entryAdded" if about["entry"]["level"] in ("error", "warning"):
                self.errors.append(about["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A tab of a browser of its own.

    Args:
        profile: folder for the browser's files.
    """
    assert CHROMIUM is not None
    ours, theirs = os.pipe(), os.pipe()
    options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe --no-first-run"
    # The browser reads from descriptor 3 and writes to 4.
    shell = f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}'
    command = ["bash", "-c", shell, CHROMIUM, *options.split(), f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        command, pass_fds=(ours[0], theirs[1]), stderr=subprocess.DEVNULL, start_new_session=True
    )
    os.close(ours[0])
    os.close(theirs[1])
    try:
        yield Tab(process, ours[1], theirs[0])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours[1])
        os.close(theirs[0])
