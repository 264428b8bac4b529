"""A headless Chromium, driven through the DevTools protocol over its debugging pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, PROGRAMS)), None)
SECONDS = 60  # that anything may take on a busy machine


class Browser:
    """One tab. Commands and events are JSON documents, each ended by a zero byte."""

    def __init__(self):
        self._home = tempfile.mkdtemp(prefix="chromium-")
        to_browser, commands = os.pipe()
        answers, from_browser = os.pipe()
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-dev-shm-usage", "--disable-background-networking", "--disable-sync",
            "--disable-component-update", "--remote-debugging-pipe",
            f"--user-data-dir={self._home}",
        ]  # fmt: skip

        def pipes():  # the browser reads from 3 and writes to 4
            read, write = os.dup(to_browser), os.dup(from_browser)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self._process = subprocess.Popen(
            [PROGRAM, *options, "about:blank"], preexec_fn=pipes, close_fds=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        os.set_blocking(answers, False)
        self._commands, self._answers = commands, answers
        self._held, self._count, self._session = b"", 0, None
        self.requests, self.faults = [], []
        targets = self.send("Target.getTargets")["targetInfos"]
        tab = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=tab, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
        shutil.rmtree(self._home, ignore_errors=True)

    def send(self, method, **params):
        """Run one command of the protocol and return its result."""
        self._count += 1
        document = {"id": self._count, "method": method, "params": params}
        if self._session:
            document["sessionId"] = self._session
        os.write(self._commands, json.dumps(document).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            for heard in self._heard():
                if heard.get("id") == self._count:
                    assert "error" not in heard, heard
                    return heard["result"]
            time.sleep(0.01)
        raise TimeoutError(method)

    def _heard(self):
        try:
            while part := os.read(self._answers, 1 << 16):
                self._held += part
        except BlockingIOError:
            pass
        *documents, self._held = self._held.split(b"\0")
        heard = [json.loads(d) for d in documents]
        for event in heard:
            method, params = event.get("method"), event.get("params", {})
            if method == "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            elif method == "Runtime.exceptionThrown":
                self.faults.append(params["exceptionDetails"]["text"])
            elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
                self.faults.append(params["entry"]["text"])
        return heard

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script):
        """The value of a JavaScript expression in the page."""
        result = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script):
        """Wait until an expression is true."""
        until = time.monotonic() + SECONDS
        while not self.run(script):
            assert time.monotonic() < until, script
            time.sleep(0.05)

    def key(self, name, text=""):
        """Press a key wherever the focus is."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        press = {"key": name, "code": name, "windowsVirtualKeyCode": codes[name]}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **press)
        self.send("Input.dispatchKeyEvent", type="keyUp", **press)

    def type(self, text):
        self.send("Input.insertText", text=text)

    def click(self, selector):
        """A real click in the middle of an element, which has to be visible there."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block:"
            "'nearest'}); const r = e.getBoundingClientRect();"
            "const x = r.x + r.width / 2, y = r.y + r.height / 2;"
            "if (!e.contains(document.elementFromPoint(x, y))) throw Error('it is covered');"
            "return [x, y]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def upload(self, selector, path: Path):
        """Choose a file, as a person would in the dialogue of the browser."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def size(self, width, height, *, dark=False):
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path):
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
