"""A headless Chrome or Chromium for tests, driven by its own protocol (Chrome DevTools Protocol) over two pipes.

Only what the tests need: open a file or an address, run JavaScript, press keys, type, click, take a picture, and hear what the
page says and asks for. Every wait is for a condition, with one generous limit.
"""

import base64
import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 60.0
KEYS = {
    "Enter": (13, "\r"), " ": (32, " "), "Escape": (27, ""), "Tab": (9, ""), "Home": (36, ""), "End": (35, ""),
    "ArrowLeft": (37, ""), "ArrowUp": (38, ""), "ArrowRight": (39, ""), "ArrowDown": (40, ""),
}  # fmt: skip
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-default-browser-check",
    "--disable-extensions", "--disable-component-update", "--disable-sync", "--disable-breakpad",
    "--disable-background-networking",
    "--disable-renderer-backgrounding", "--disable-background-timer-throttling", "--password-store=basic", "--use-mock-keychain",
    "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


def find_chrome() -> str | None:
    """Path of the Chrome that figures are drawn with, or None."""
    named = os.environ.get("CHROME_PATH")
    if named and os.access(named, os.X_OK):
        return named
    from choreographer.browsers.chromium import Chromium

    path = Chromium.find_browser(skip_local=False)
    return str(path) if path and os.access(path, os.X_OK) else None


class BrowserError(AssertionError):
    """The browser answered with an error, the page threw, or a condition never came true."""


class Browser:
    """One browser with one page; a context manager."""

    def __init__(self, chrome: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chrome-", ignore_cleanup_errors=True)
        # The protocol is spoken on descriptors 3 (to the browser) and 4 (from it).
        self._process = subprocess.Popen(
            ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1', chrome, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._heard: queue.Queue[dict[str, Any]] = queue.Queue()
        self._answers: dict[int, dict[str, Any]] = {}
        self._last = 0
        self._session: str | None = None
        self.said: list[str] = []  # console messages and exceptions, as "error: ..." and so on
        self.asked: list[str] = []  # addresses the page requested
        self.loaded = False
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> "Browser":
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrowserError, OSError):
            self._session = None
            self.send("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(10)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._profile.cleanup()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        with contextlib.suppress(ValueError, OSError):
            while part := os.read(self._process.stdout.fileno(), 1 << 16):
                *whole, rest = (rest + part).split(b"\0")
                for message in whole:
                    self._heard.put(json.loads(message))
        self._heard.put({"method": "closed"})

    def _take(self, until: float) -> None:
        try:
            message = self._heard.get(timeout=max(0.01, until - time.monotonic()))
        except queue.Empty:
            raise BrowserError(f"the browser said nothing for {LIMIT:.0f} s") from None
        match message:
            case {"id": number}:
                self._answers[number] = message
            case {"method": "closed"}:
                raise BrowserError(f"the browser ended (exit status {self._process.poll()})")
            case {"method": "Runtime.consoleAPICalled", "params": p}:
                words = [str(a.get("value", a.get("description", a["type"]))) for a in p["args"]]
                self.said.append(f"{p['type']}: {' '.join(words)}")
            case {"method": "Runtime.exceptionThrown", "params": p}:
                details = p["exceptionDetails"]
                self.said.append(f"exception: {details.get('exception', {}).get('description', details['text'])}")
            case {"method": "Log.entryAdded", "params": p}:
                self.said.append(f"{p['entry']['level']}: {p['entry']['text']} {p['entry'].get('url', '')}")
            case {"method": "Network.requestWillBeSent", "params": p}:
                self.asked.append(p["request"]["url"])
            case {"method": "Page.loadEventFired"}:
                self.loaded = True

    def _until(self, done: Callable[[], bool]) -> None:
        until = time.monotonic() + LIMIT
        while not done():
            self._take(until)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        self._last += 1
        number = self._last
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        self._until(lambda: number in self._answers)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path: Path, *, width: int = 1280, height: int = 900, phone: bool = False) -> None:
        """Load a file in a window of this size (CSS pixels) and forget what was said and asked before."""
        self.visit(path.resolve().as_uri(), width=width, height=height, phone=phone)

    def visit(self, url: str, *, width: int = 1280, height: int = 900, phone: bool = False) -> None:
        """The same for any address."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.said, self.asked, self.loaded = [], [], False
        self.send("Page.navigate", url=url)
        self._until(lambda: self.loaded)

    def js(self, expression: str) -> Any:
        """Value of a JavaScript expression (a promise is waited for)."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(f"{expression}: {details.get('exception', {}).get('description', details['text'])}")
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true in the page; looked at in the page itself."""
        until = int(LIMIT * 900)
        self.js(
            f"new Promise((done, fail) => {{ const start = Date.now(); const look = () => {{ const v = ({expression});"
            f" if (v) done(true); else if (Date.now() - start > {until}) fail(new Error('never true'));"
            " else setTimeout(look, 10); }; look(); })"
        )

    def click(self, selector: str) -> None:
        """Press the left mouse button on the middle of an element, after scrolling it into view."""
        at = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', inline: 'center'}); const r = e.getBoundingClientRect();"
            " return {x: r.x + r.width / 2, y: r.y + r.height / 2}; })()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def hover(self, selector: str) -> None:
        """Move the mouse to the middle of an element."""
        at = self.js(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return {x: r.x + r.width / 2, y: r.y + r.height / 2}; })()"
        )
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **at)

    def press(self, *keys: str, shift: bool = False) -> None:
        """Press keys, one after the other, at the element that has the focus."""
        for key in keys:
            code, text = KEYS[key]
            rest = {
                "key": key,
                "code": "Space" if key == " " else key,
                "windowsVirtualKeyCode": code,
                "modifiers": 8 * shift,
            }
            self.send(
                "Input.dispatchKeyEvent",
                type="keyDown" if text else "rawKeyDown",
                **rest,
                **({"text": text} if text else {}),
            )
            self.send("Input.dispatchKeyEvent", type="keyUp", **rest)

    def choose(self, selector: str, value: str) -> None:
        """Set a select or an input and tell the page, as the browser does after a choice."""
        self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
            " for (const t of ['input', 'change']) e.dispatchEvent(new Event(t, {bubbles: true})); })()"
        )

    def type(self, text: str) -> None:
        """Type a text at the element that has the focus."""
        self.send("Input.insertText", text=text)

    def picture(self, path: Path, *, whole: bool = False, of: str | None = None) -> Path:
        """Write a PNG of the window, of the whole page, or of one element (a selector), also where it is out of sight."""
        part: dict[str, Any] = {}
        if of is not None:
            box = self.js(
                f"(() => {{ const r = document.querySelector({json.dumps(of)}).getBoundingClientRect();"
                " return {x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height, scale: 1}; })()"
            )
            part = {"clip": box}
        answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **part)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path
