"""Takes a picture of MLflow's page of a run, in headless Chromium: docs/pictures/page.png.

``python docs/pictures/pages.py OUTPUT_DIR FOLDER`` takes pictures of all pages of the newest run in an output folder.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError
from urllib.request import urlopen

from PIL import Image

from ksuit_runner.paths import OutputPaths
from ksuit_runner.record.stored_run import find_local
from ksuit_runner.tracker import mlflow_store

PICTURE = Path(__file__).with_name("page.png")
OVERRIDES = ("callbacks=[ema,accuracy,loss,best_checkpoint]", "name=digits-cnn")
WIDTH, HEIGHT = 1280, 860
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)
SETTLE_S, LONGEST_S = 2.0, 120.0
TIDY = """
{
  const style = document.createElement('style');
  style.innerText = '.modebar {display: none !important}';
  document.head.append(style);
  const items = [...document.querySelectorAll('button, label, a')];
  items.filter(item => /^close/i.test(item.ariaLabel || item.innerText || '')).forEach(item => item.click());
  items.length > 10;
}
"""
"""Closes the assistant, hides what covers charts, and says if the page is there."""
VIEW = "?workflowType=machine_learning"
"""Has the page show what is for training, and not what is for language models."""


def main() -> None:
    """Train, and write the picture of the charts; or pictures of all pages of a run that is there."""
    if len(sys.argv) > 1:
        output_dir, folder = map(Path, sys.argv[1:])
        with served(output_dir) as address, browser() as page:
            paths = OutputPaths(output_dir.absolute())
            run_id = find_local(paths, "last")
            folder.mkdir(parents=True, exist_ok=True)
            for name, path in pages(run_id).items():
                (folder / f"{name}.png").write_bytes(page.picture(f"{address}/#{path}"))
        return
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "ksuit_runner", *OVERRIDES, f"output_dir={name}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        run_id = find_local(OutputPaths(Path(name)), "last")
        with served(Path(name)) as address, browser() as page:
            found = page.picture(f"{address}/#{pages(run_id)['charts']}")
    picture = Image.open(BytesIO(found)).convert("RGB")
    picture.quantize(48, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


def pages(run_id: str | None, experiment: int = 1) -> dict[str, str]:
    """Return the paths of the pages that show runs."""
    run = f"/experiments/{experiment}/runs/{run_id}"
    found = {
        "overview": run,
        "charts": f"{run}/model-metrics",
        "artifacts": f"{run}/artifacts",
        "runs": f"/experiments/{experiment}/runs",
        "logged_models": f"/experiments/{experiment}/models",
        "models": "/models",
    }
    return {name: path + VIEW for name, path in found.items()}


@contextmanager
def served(output_dir: Path) -> Iterator[str]:
    """Serve MLflow's page of an output folder on this machine, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = mlflow_store.uri(OutputPaths(output_dir.absolute()))
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command += ["--port", str(port), "--workers", "1"]
    server = subprocess.Popen(command, start_new_session=True, env=environment, **silent)
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def wait_for(address: str) -> None:
    """Wait until a server answers."""
    end = time.monotonic() + LONGEST_S
    while True:
        try:
            urlopen(address, timeout=5).close()
            return
        except (URLError, OSError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


@contextmanager
def browser() -> Iterator["Page"]:
    """Start Chromium, and yield a page of it."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        sys.exit("Chromium is needed")
    to_browser, for_us = os.pipe(), os.pipe()

    def connect() -> None:  # Chromium reads from 3 and writes to 4
        read, write = os.dup(to_browser[0]), os.dup(for_us[1])
        os.dup2(read, 3)
        os.dup2(write, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as data:
        command = [program, *FLAGS, f"--user-data-dir={data}", f"--window-size={WIDTH},{HEIGHT}"]
        silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, preexec_fn=connect, close_fds=False, start_new_session=True, **silent)
        try:
            with os.fdopen(to_browser[1], "wb", 0) as write, os.fdopen(for_us[0], "rb") as read:
                yield Page(write, read)
        finally:
            os.killpg(process.pid, 15)
            process.wait()


class Page:
    """A page of Chromium, which is told what to do by its debugging protocol over pipes."""

    def __init__(self, write: IO[bytes], read: IO[bytes]) -> None:
        self._write, self._read, self._count = write, read, 0
        self._session: str | None = None
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        self.tell("Emulation.setDeviceMetricsOverride", **size)
        self.tell("Page.enable")

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def picture(self, address: str) -> bytes:
        """Open an address, wait until little more changes, and return the page as a PNG."""
        self.tell("Page.navigate", url="about:blank")
        self.tell("Page.navigate", url=address)
        before, end = b"", time.monotonic() + LONGEST_S
        while True:
            time.sleep(SETTLE_S)
            is_tidy = self.tell("Runtime.evaluate", expression=TIDY)["result"]["value"]
            now = base64.b64decode(self.tell("Page.captureScreenshot", format="png")["data"])
            if (is_tidy and now == before) or time.monotonic() > end:
                return now
            before = now

    def _message(self) -> bytes:
        found = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("Chromium has ended")
            found += byte
        return bytes(found)


if __name__ == "__main__":
    main()
