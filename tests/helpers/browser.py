"""A headless Chromium for tests, spoken to over a pipe in its DevTools protocol; no port, no driver, no network."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES_OFF = ("gpu", "quic", "background-networking", "component-update", "sync")
FLAGS = ["--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe"]
FLAGS += [f"--disable-{name}" for name in SWITCHES_OFF]
KEYS = {"Escape": 27, "ArrowRight": 39, "ArrowDown": 40}


@dataclass
class Browser:
    """One page of a browser."""

    commands: IO[bytes]
    answers: IO[bytes]
    session: str = ""
    count: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    buffer: bytes = b""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Source: https://chromedevtools.github.io/devtools-protocol; over a pipe, messages end in a zero byte."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            block = os.read(self.answers.fileno(), 1 << 20)
            if not block:
                raise RuntimeError("the browser has ended")
            self.buffer += block
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int = 1000, dark: bool = False) -> None:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def click(self, selector: str, share: float = 0.5) -> None:
        """With the mouse, in the middle of an element's height and at ``share`` of its width."""
        box = self.evaluate(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            f" return [r.x + {share} * r.width, r.y + r.height / 2] }})(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
            self.call("Input.dispatchKeyEvent", type=kind, **code)

    def requests(self) -> list[str]:
        """Addresses that the page has asked for since it was opened, its own and inlined data left out."""
        asked = [event["params"]["request"]["url"] for event in self.events if event["method"] == REQUEST]
        return [url for url in asked[1:] if not url.startswith("data:")]

    def complaints(self) -> list[str]:
        """What the page's scripts and its policy reported."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in kinds]


REQUEST = "Network.requestWillBeSent"


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Started with ``profile`` for its files, and ended."""
    their_input, our_output = os.pipe()
    our_input, their_output = os.pipe()
    assert CHROMIUM is not None
    # DevTools' pipe is file descriptors 3 and 4.
    shell = ["bash", "-c", f'exec "$@" 3<&{their_input} 4>&{their_output}', "-"]
    process = subprocess.Popen(
        [*shell, CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(their_input, their_output),
        stderr=subprocess.DEVNULL,
    )
    os.close(their_input)
    os.close(their_output)
    with os.fdopen(our_output, "wb") as commands, os.fdopen(our_input, "rb") as answers:
        page = Browser(commands, answers)
        try:
            targets = page.call("Target.getTargets")["targetInfos"]
            target = next(info["targetId"] for info in targets if info["type"] == "page")
            page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Network", "Runtime", "Log"):
                page.call(f"{domain}.enable")
            yield page
        finally:
            process.terminate()
            process.wait()
