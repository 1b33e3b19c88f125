"""The recorder's process: ``python -m ksuit_runner.recorder FD PID``, started by the training process only."""

import logging
import os
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection

from ksuit_runner.recorder.protocol import Channel
from ksuit_runner.recorder.server import ChannelHandler, Server, Surroundings
from ksuit_runner.recorder.session import Opening
from ksuit_runner.system import lean_import
from ksuit_runner.system.detached_process import ignore_signals
from ksuit_runner.system.imports import own_process
from ksuit_runner.system.process_watch import ProcessWatch

_LOOK_S = 10.0


class _Adopted:
    """Takes over the surroundings of the training process.

    Only what has changed there is changed here: MLflow's client keeps settings of its own in the environment.
    """

    def __init__(self) -> None:
        self._environment = dict(os.environ)

    def adopt(self, surroundings: Surroundings, opening: Opening) -> None:
        before, now = self._environment, surroundings.environment
        for name in before.keys() - now.keys():
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in now.items() if before.get(name) != value})
        self._environment = now
        sys.path[:] = surroundings.path
        with suppress(OSError):  # it may be gone by now, for the training process as well
            os.chdir(surroundings.directory)
        lean_import.allow(opening.is_shipped)


def _close_after(watch: ProcessWatch, channel: Channel) -> None:
    """Close the channel when the other process has died: a child of its may have inherited its end."""
    while not watch.is_gone(_LOOK_S):
        pass
    channel.close()


def main() -> None:
    """Serve the training process, at the other end of the channel, until it is gone; then record its death."""
    ignore_signals()
    own_process()
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # a tracker's own processes must not keep it open
    channel, watch = Channel(Connection(descriptor)), ProcessWatch(int(sys.argv[2]))
    logger = logging.getLogger("ksuit_runner")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(ChannelHandler(channel))
    threading.Thread(target=_close_after, args=(watch, channel), daemon=True).start()
    server = Server(channel, _Adopted().adopt)
    server.serve()
    if server.records_runs:  # of which none was closed
        while not watch.is_gone(_LOOK_S):
            pass
        server.end_dead(watch.reason())


status = 1
try:
    main()
    status = 0
except BaseException:
    traceback.print_exc()
finally:
    os._exit(status)  # threads that still wait for a server must not keep this process alive
