"""Recorders that start in milliseconds: forked from a process of the command line as it was before it did anything.

They are processes like any other (own pid, own session, killed by SIGKILL); only the seconds of imports are saved.
"""

import itertools
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import IO

from ksuit_runner.recorder import life
from ksuit_runner.system.process_watch import ProcessWatch

_MOST_BYTES = 1 << 18

newest_pid: int | None = None
"""Id of the last recorder of this process."""


def fork_recorders(prepare: Callable[[int, int], None]) -> None:
    """Have this process, which has one thread yet, fork its recorders from a copy of what it is now.

    Args:
        prepare: Called first in every recorder with its number, from 0, and the id of this process.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        _serve(theirs, prepare)
        os._exit(0)
    theirs.close()

    def start(descriptor: int, output: IO[bytes]) -> _Recorder:
        global newest_pid
        values = {"path": life._import_path(), "environment": dict(os.environ), "pid": os.getpid()}
        socket.send_fds(ours, [json.dumps(values).encode()], [descriptor, output.fileno()])
        newest_pid = int(ours.recv(100))
        return _Recorder(newest_pid)

    life._start_process = start


class _Recorder:
    """What is used of ``subprocess.Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._watch = ProcessWatch(pid)

    def poll(self) -> int | None:
        return 0 if self._watch.is_gone() else None

    def wait(self) -> None:
        while not self._watch.is_gone(1.0):
            pass
        self._watch.close()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _serve(channel: socket.socket, prepare: Callable[[int, int], None]) -> None:
    """Fork until the process that asks is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for number in itertools.count():
        message, descriptors, _, _ = socket.recv_fds(channel, _MOST_BYTES, 2)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            channel.close()
            _become_recorder(json.loads(message), *descriptors, number, prepare)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(str(pid).encode())


def _become_recorder(
    values: dict[str, object], descriptor: int, output: int, number: int, prepare: Callable[[int, int], None]
) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(values["environment"])
    sys.path[:] = values["path"]
    sys.argv = ["ksuit_runner.recorder", str(descriptor), str(values["pid"])]
    try:
        prepare(number, values["pid"])
        runpy.run_module("ksuit_runner.recorder", run_name="__main__")
    except BaseException:
        traceback.print_exc()
    os._exit(1)
