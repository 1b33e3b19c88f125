"""Trackers that fail: a real ``mlflow server`` that is stopped or hung, servers that never answer, locked databases."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """A real ``mlflow server``, with proxied artifacts, that can be stopped and hung.

    Args:
        folder: Folder for its files.
        backend: URI of its database; by default an SQLite database in the folder.
        workers: Number of its processes.

    Attributes:
        database: Its database.
        store: Folder of its artifacts.
        uri: Its address, whether it runs or not.
    """

    def __init__(self, folder: Path, backend: str | None = None, workers: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.database = folder / "server.db"
        self.store = folder / "store"
        self.backend = backend or f"sqlite:///{self.database}"
        self.workers = workers
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", str(self.workers), "--backend-store-uri", self.backend]
        command += ["--artifacts-destination", str(self.store)]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                assert self._process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def hang(self) -> None:
        """Suspend it: it accepts connections and never answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Answer again after ``hang``."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None:
            self._signal(signal.SIGKILL)  # its own process group: the server and its worker
            self._process.wait()
            self._process = None

    def query(self, sql: str) -> list[tuple]:
        with closing(sqlite3.connect(self.database, timeout=60)) as database:
            return database.execute(sql).fetchall()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)


class _Silent(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


class _Error(_Silent):
    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer


@contextmanager
def answering_500() -> Iterator[str]:
    """A server that answers everything with 500; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Error)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def never_answering() -> Iterator[str]:
    """A server that accepts connections, as the kernel does for it, and never answers; yields its address."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Hold an exclusive lock on an SQLite database: nobody else can read or write."""
    with closing(sqlite3.connect(database, timeout=60, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


class Proxy:
    """A server in front of another one, which forwards every request, or answers with 500.

    Attributes:
        is_broken: Whether it answers with 500.
        uri: Its address.
    """

    def __init__(self, target: str) -> None:
        self.is_broken = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(target))
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(proxy, target: str) -> type[BaseHTTPRequestHandler]:
        class Forward(_Silent):
            def _answer(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if proxy.is_broken:
                    self._send(500, b"")
                    return
                headers = {"Content-Type": self.headers.get("Content-Type", "application/octet-stream")}
                try:
                    with urlopen(Request(target + self.path, data or None, headers, method=self.command)) as answer:
                        self._send(answer.status, answer.read())
                except HTTPError as error:
                    self._send(error.code, error.read())

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

        return Forward
