"""Opens pages in a headless Chromium through its debugging pipe; needs no package."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One tab. `events` are all that it has reported since the last `open`."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        self.events: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Makes the tab."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{part}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the DevTools protocol."""
        number = next(self._numbers)
        asked = {"id": number, "method": method, "params": params}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._commands, json.dumps(asked).encode() + b"\0")
        while (told := self._next()).get("id") != number:
            self.events.append(told)
        assert "error" not in told, told
        return told["result"]

    def open(self, page: Path, width: int) -> None:
        """Loads a page in a window of this width, to the end."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._answers, 1 << 16)
            assert data, "Chromium ended"
            self._rest += data
        told, _, self._rest = self._rest.partition(b"\0")
        return json.loads(told)


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A Chromium with its profile in `folder`, ended afterwards."""
    commands_read, commands = os.pipe()
    answers, answers_write = os.pipe()
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    words = [PROGRAM, *arguments, f"--user-data-dir={folder}", "about:blank"]
    script = f'exec "$@" 3<&{commands_read} 4>&{answers_write}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *words],
        pass_fds=(commands_read, answers_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_read)
    os.close(answers_write)
    try:
        tab = Browser(commands, answers)
        tab.begin()
        yield tab
    finally:
        os.close(commands)
        process.terminate()
        process.wait(timeout=30)
        os.close(answers)
