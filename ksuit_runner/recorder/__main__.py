"""The recorder's process: ``python -m ksuit_runner.recorder FD PID``, started by the training process only."""

import os
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

from ksuit_runner.recorder.protocol import Channel
from ksuit_runner.recorder.server import Server, Surroundings
from ksuit_runner.system.signals import ignore_signals


class _Adopted:
    """Takes over the surroundings of the training process.

    Only what has changed there is changed here: MLflow's client keeps settings of its own in the environment.
    """

    def __init__(self) -> None:
        self._environment = dict(os.environ)

    def adopt(self, surroundings: Surroundings) -> None:
        before, now = self._environment, surroundings.environment
        for name in before.keys() - now.keys():
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in now.items() if before.get(name) != value})
        self._environment = now
        sys.path[:] = surroundings.path
        with suppress(OSError):  # it may be gone by now, for the training process as well
            os.chdir(surroundings.directory)


def main() -> None:
    """Serve the training process, at the other end of the channel, until it is gone."""
    ignore_signals()
    channel, parent = Channel(Connection(int(sys.argv[1]))), int(sys.argv[2])
    Server(channel, lambda: os.getppid() == parent, _Adopted().adopt).serve()
    os._exit(0)  # threads that still wait for a server must not keep this process alive


main()
