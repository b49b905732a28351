"""A Chromium without a window, driven by the DevTools protocol over a pipe: no port, no network, nothing left behind.

with chromium(profile) as browser:
    browser.open(page, width=390, night=True)
    browser.value("document.documentElement.scrollWidth")
"""

import base64
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
SECONDS = 60  # for one answer
COMPLAINTS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.requestWillBeSent")


class Browser:
    """One tab. `said` are the messages of its console, its exceptions, and the addresses that it asked for."""

    def __init__(self, send: int, receive: int) -> None:
        self.said: list[str] = []
        self._send, self._receive, self._numbers = send, receive, itertools.count(1)
        self._buffer, self._session, self._events = b"", "", set[str]()
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def open(self, page: Path, width: int, *, night: bool = False, paper: bool = False) -> None:
        """Load a page in a window of a width, by day or by night, or as it is laid out for paper."""
        self.said.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if night else "light"}
        self.ask("Emulation.setEmulatedMedia", media="print" if paper else "screen", features=[scheme])
        size: dict[str, Any] = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self._events.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._read(time.monotonic() + SECONDS)

    def value(self, script: str) -> Any:
        """What an expression of JavaScript is, as plain values."""
        reply = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def picture(self) -> bytes:
        """The whole page, a PNG."""
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def printed(self) -> bytes:
        """The page on paper, of the size that it wants, a PDF."""
        return base64.b64decode(self.ask("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the protocol."""
        number, until = next(self._numbers), time.monotonic() + SECONDS
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        left = memoryview(json.dumps(message).encode() + b"\0")
        while left:
            left = left[os.write(self._send, left) :]
        while (answer := self._read(until)).get("id") != number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self, until: float) -> dict[str, Any]:
        """The next message; events are put on record."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._receive], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"the browser did not answer within {SECONDS} s"
            part = os.read(self._receive, 1 << 20)
            assert part, "the browser has gone"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        method = message.get("method", "")
        self._events.add(method)
        if method in COMPLAINTS:
            self.said.append(_told(method, message["params"]))
        return message


def _told(method: str, what: dict[str, Any]) -> str:
    if method == "Network.requestWillBeSent":
        return f"request {what['request']['url'][:200]}"
    return f"{method} {json.dumps(what)[:500]}"


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a new profile in that folder; its processes end with the block."""
    to_it, from_it = os.pipe(), os.pipe()
    wired = f'exec "$0" "$@" 3<&{to_it[0]} 4>&{from_it[1]}'  # Chromium listens at 3 and talks at 4
    process = subprocess.Popen(
        ["bash", "-c", wired, str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(to_it[0], from_it[1]), start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_it[0])
    os.close(from_it[1])
    try:
        yield Browser(to_it[1], from_it[0])
    finally:
        os.close(to_it[1])
        with suppress(ProcessLookupError):  # it went by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(from_it[0])
