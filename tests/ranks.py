"""Runs functions and the command line as the ranks of a run: real processes, which exchange over 127.0.0.1.

They are forked from a server that has imported everything, so that a rank starts in milliseconds.
"""

import os
import pickle
import secrets
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from command import REPOSITORY, environment
from preloaded import Command, Preloaded, context


def free_port() -> int:
    """Return a port that nobody listens at, of those that outgoing connections do not take meanwhile."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def surroundings(rank: int, size: int, port: int, nodes: int = 1) -> dict[str, str]:
    """Return what torchrun puts into the environment of a rank."""
    local = size // nodes
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank % local),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


class Rank:
    """A process that calls a function.

    Attributes:
        process: The process.
    """

    def __init__(self, process: Any, results: Connection) -> None:
        self.process = process
        self._results = results

    def result(self, timeout_s: float = 60.0) -> Any:
        """Return what the function has returned.

        Raises:
            AssertionError: It has raised an error, has ended otherwise, or takes too long.
        """
        assert wait([self._results], timeout_s), "a rank takes too long"
        try:
            is_error, value = pickle.loads(self._results.recv_bytes())
        except EOFError:
            self.process.join(timeout_s)
            raise AssertionError(f"a rank has ended with exit code {self.process.exitcode}") from None
        assert not is_error, value
        return value


class Ranks:
    """Starts ranks, and kills at the end of the block what is left of them."""

    def __init__(self) -> None:
        self._context = context()
        self._started: list[Rank] = []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self._started:
            if rank.process.is_alive():
                rank.process.kill()
            rank.process.join()

    def start(
        self,
        size: int,
        function: Callable[..., Any],
        *arguments: Any,
        nodes: int = 1,
        only: Sequence[int] | None = None,
        change: Mapping[str, str] | None = None,
    ) -> list[Rank]:
        """Start ranks that call a function with these arguments, and return them; see ``on_ranks``.

        Args:
            only: Start only these.
            change: Changes to their environment.
        """
        port, begun = free_port(), []
        for number in range(size) if only is None else only:
            ours, theirs = self._context.Pipe(duplex=False)
            around = surroundings(number, size, port, nodes) | dict(change or {})
            given = (theirs, around, function, arguments)
            process = self._context.Process(target=_call, args=given, daemon=True)
            process.start()
            theirs.close()
            begun.append(Rank(process, ours))
        self._started += begun
        return begun


def on_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, nodes: int = 1, timeout_s: float = 60.0
) -> list[Any]:
    """Call a function on each of so many ranks, and return what they return, in their order.

    Args:
        size: Number of ranks.
        function: Function at the top level of a module. It finds the others by ``connect`` or ``connect_ranks``, as
            its environment is that of torchrun.
        arguments: What it is called with; it has to be picklable, like its result.
        nodes: Of how many machines they are told that they are.
        timeout_s: After this time they are killed, and the test fails.
    """
    deadline = time.monotonic() + timeout_s
    with Ranks() as ranks:
        begun = ranks.start(size, function, *arguments, nodes=nodes)
        results = [rank.result(max(0.0, deadline - time.monotonic())) for rank in begun]
        for rank in begun:
            rank.process.join(max(0.1, deadline - time.monotonic()))
            assert rank.process.exitcode == 0, rank.process.exitcode
        return results


def _call(
    results: Connection, environment: Mapping[str, str], function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    os.environ.update(environment)
    try:
        results.send_bytes(pickle.dumps((False, function(*arguments))))  # tensors by value, and not by shared memory
    except BaseException:
        results.send_bytes(pickle.dumps((True, traceback.format_exc())))
        raise SystemExit(1) from None
    finally:
        results.close()


class Commands:
    """The command line as the ranks of a run: ``python -m ksuit_runner``, with what torchrun gives each of them.

    Args:
        output_dir: Where they write.
        size: Number of ranks.
        arguments: Arguments of the command line.
        cwd: Working directory.
        change: Changes to the environment, by rank.

    Attributes:
        ranks: The processes.
    """

    def __init__(
        self,
        output_dir: Path,
        size: int,
        *arguments: str,
        cwd: Path = REPOSITORY,
        change: Callable[[int], Mapping[str, str]] = lambda rank: {},
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        port, given = free_port(), (f"output_dir={output_dir}", *arguments)
        self.ranks: list[Command] = []
        for rank in range(size):
            around = environment() | surroundings(rank, size, port) | change(rank)
            log = Path(self._folder.name, f"rank{rank}")
            self.ranks.append(Preloaded().start(cwd, log, given, _surround, around))

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self.ranks:
            with suppress(ProcessLookupError):
                rank.kill()
        self._folder.cleanup()

    def wait(self, timeout_s: float = 120.0) -> list[int]:
        """Return the exit statuses, in the order of the ranks."""
        deadline = time.monotonic() + timeout_s
        return [rank.wait(max(0.1, deadline - time.monotonic())) for rank in self.ranks]

    def output(self) -> str:
        """Return what they have printed so far."""
        return "\n".join(f"--- rank {number}\n{rank.output()}" for number, rank in enumerate(self.ranks))


def ksuit_on_ranks(output_dir: Path, size: int, *arguments: str, status: int = 0, cwd: Path = REPOSITORY) -> str:
    """Run the command line on so many ranks, and return what they print."""
    with Commands(output_dir, size, *arguments, cwd=cwd) as commands:
        found = commands.wait()
        assert found == [status] * size, f"{found}\n{commands.output()}"
        return commands.output()


def _surround(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
