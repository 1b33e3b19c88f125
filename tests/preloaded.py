"""Processes of the command line that start in milliseconds: forked from one that has imported everything.

They are processes like any other (own pid, own workers, killed by SIGKILL); only the seconds of imports are saved.
"""

import atexit
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import psutil
from command import REPOSITORY, environment, remember
from forked_recorder import fork_recorders

from ksuit_runner.paths import OutputPaths
from ksuit_runner.tracker import mlflow_store

IMPORTS = (
    *("ksuit_runner.cli.dispatch", "ksuit_runner.engine.runner", "ksuit_runner.tracker.mlflow"),
    *("ksuit_runner.recorder.server", "ksuit_runner.recorder.life", "ksuit_runner.engine.connect_ranks"),
    *("ksuit_runner.distributed.ddp", "ksuit_runner.distributed.fsdp", "torch._dynamo"),
    *("ksuit_runner.cli.start", "ksuit_runner.reports.live_curves", "ksuit_runner.ui.progress_bar"),
    *("mlflow", "mlflow.store.tracking.sqlalchemy_workspace_store", "hydra._internal.hydra", "pytest"),
    *("sqlalchemy.dialects.sqlite", "alembic.command", "email.policy"),
)


def context() -> ForkServerContext:
    """Return the context of processes that have imported everything.

    All tests of a worker have one server, and the first one of them that asks for it decides what it imports.
    """
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(IMPORTS))
    return found


class Printed:
    """What a command line has printed, to be read while it goes on."""

    def __init__(self, command: "Command") -> None:
        self._command = command
        self._file = command.log.open()

    def readline(self) -> str:
        """Wait for the next line and return it; an empty one if nothing more will come."""
        line = ""
        while True:
            is_alive = self._command.is_alive()
            line += self._file.readline()
            if line.endswith("\n") or not is_alive:
                return line
            time.sleep(0.005)

    def read(self) -> str:
        """Wait for the end, and return the rest."""
        self._command.wait()
        return self._file.read()

    def close(self) -> None:
        self._file.close()


class Command:
    """A running command line, with what the tests need of ``subprocess.Popen``; it prints to a file.

    Args:
        process: The process.
        log: Its file.

    Attributes:
        log: File with everything that it prints.
    """

    def __init__(self, process: ForkServerProcess, log: Path) -> None:
        self._process = process
        self.log = log

    @cached_property
    def stdout(self) -> Printed:
        return Printed(self)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def is_suspended(self) -> bool:
        """Wait until it is suspended or has ended; return whether it is suspended."""
        while self._process.is_alive():
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(self.pid).status() == psutil.STATUS_STOPPED:
                    return True
            time.sleep(0.01)
        return False

    def wait(self, timeout: float = 120) -> int:
        """Return its exit status, which is negative if a signal has ended it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"still running after {timeout} s:\n{self.output()}")
        return self._process.exitcode

    def communicate(self, timeout: float = 120) -> tuple[str, None]:
        """Wait until it ends, and return everything that it has printed."""
        self.wait(timeout)
        return self.output(), None

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


class Preloaded:
    """Starts command lines in a folder of a project."""

    def __init__(self) -> None:
        self._context = context()

    def start(
        self, cwd: Path, log: Path, arguments: Sequence[str], prepare: Callable[..., None] | None = None, *given: object
    ) -> Command:
        """Start ``python -m ksuit_runner ARGUMENTS``.

        Args:
            cwd: Its working directory.
            log: File for everything that it prints.
            arguments: Its arguments.
            prepare: Called first in the process, with the further arguments.
        """
        process = self._context.Process(target=_run, args=(str(cwd), str(log), list(arguments), prepare, given))
        process.start()
        return Command(process, log)


def _run(
    cwd: str, log: str, arguments: Sequence[str], prepare: Callable[..., None] | None, given: Sequence[object]
) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(cwd)
    os.environ.update({"NO_COLOR": "1", "COLUMNS": "200", "PWD": cwd})
    sys.argv = ["ksuit_runner", *arguments]
    sys.path.insert(0, cwd)
    if prepare is not None:
        prepare(*given)
    from ksuit_runner.cli.dispatch import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # the processes of multiprocessing leave it out


def start(
    output_dir: Path,
    *arguments: str,
    cwd: Path = REPOSITORY,
    prepare: Callable[[], None] | None = None,
    makes_database: bool = True,
) -> Command:
    """Do what ``command.start`` does without the seconds of imports, and with an empty database in a new folder.

    Args:
        output_dir: Its output folder.
        arguments: Its further arguments.
        cwd: Its working directory.
        prepare: Called first in the process.
        makes_database: Whether to make the database: not for what has to leave a new folder empty.
    """
    file, log = tempfile.mkstemp(prefix="ksuit-", suffix=".log")
    os.close(file)
    if makes_database and not any(item.startswith("tracker") for item in arguments):
        _make_database(output_dir)
    given = (f"output_dir={output_dir}", *arguments)
    command = Preloaded().start(cwd, Path(log), given, as_a_command, environment(), prepare)
    weakref.finalize(command, os.unlink, log)
    remember(command)
    return command


def _make_database(output_dir: Path) -> None:
    """Copy an empty database into a folder that is new: creating one takes a second, copying it a millisecond."""
    if not output_dir.exists() or not any(output_dir.iterdir()):
        shutil.copytree(_template().name, output_dir, dirs_exist_ok=True)


@cache
def _template() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="ksuit-")
    process = context().Process(target=mlflow_store.open_store, args=(OutputPaths(Path(folder.name)),))
    process.start()
    process.join()
    assert process.exitcode == 0
    return folder


def ksuit(output_dir: Path, *arguments: str, status: int = 0, cwd: Path = REPOSITORY) -> str:
    """Do what ``command.ksuit`` does, by processes without its seconds of imports, and return what is printed."""
    command = start(output_dir, *arguments, cwd=cwd, makes_database=status != 2)
    assert command.wait(240) == status, command.output()
    return command.output()


def as_a_command(surroundings: Mapping[str, str], prepare: Callable[[], None] | None = None) -> None:
    os.environ.clear()
    os.environ.update(surroundings)
    if prepare is not None:
        prepare()
    fork_recorders(lambda number, training: None)
