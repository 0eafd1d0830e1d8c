"""A headless Chromium, driven by the DevTools protocol through a pair of pipes."""

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 600
# descriptors that the shell can give the numbers 3 and 4, which Chromium reads and writes
FIRST_FREE = 10


def find() -> str | None:
    """Return the path of a Chromium, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a headless Chromium; use it in a `with` block."""

    def __init__(self, program: str, profile: Path):
        read_theirs, write_ours = os.pipe()
        read_ours, write_theirs = os.pipe()
        theirs = [fcntl.fcntl(number, fcntl.F_DUPFD, FIRST_FREE) for number in (read_theirs, write_theirs)]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        flags.append("--remote-debugging-pipe")
        command = ["timeout", str(SECONDS), program, *flags, "about:blank"]
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash", *command]
        self._process = subprocess.Popen(shell, pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for number in (read_theirs, write_theirs, *theirs):
            os.close(number)
        self._in, self._out = os.fdopen(write_ours, "wb", 0), os.fdopen(read_ours, "rb", 0)
        self._numbers, self._rest, self._session = itertools.count(1), b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self._in.close()
        self._process.terminate()
        self._process.wait()
        self._out.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._in.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> bytes:
        while b"\0" not in self._rest:
            part = self._out.read(1 << 16)
            assert part, "Chromium has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return message

    def open(self, path: Path, width: int, scheme: str) -> None:
        """Show a file at a width in pixels, with the colour scheme light or dark, and wait for its pictures."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.resolve().as_uri())
        loaded = f"location.href == {json.dumps(path.resolve().as_uri())} && document.readyState == 'complete'"
        self.evaluate(
            f"new Promise(done => {{ const look = () => {loaded} ? done() : setTimeout(look, 20); look(); }})"
        )

    def evaluate(self, expression: str) -> Any:
        """Return the plain value of an expression of JavaScript, awaited where it is a promise."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path, height: int | None = None) -> None:
        """Write the page as PNG, from its top to `height` pixels, or all of it."""
        box = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": box["width"], "height": height or box["height"], "scale": 1}
        shown = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shown["data"]))

    def pdf(self) -> bytes:
        """Return the page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])
