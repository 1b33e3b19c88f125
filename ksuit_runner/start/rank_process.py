"""A rank that the runner has started itself: ``python -m ksuit_runner.start.rank_process FD PID``."""

import os
import pickle
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection

import msgspec

from ksuit_runner.errors import KsuitError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.start.begun_runs import BegunRuns
from ksuit_runner.start.start_run import RankEnd, RankTask, execute
from ksuit_runner.system.detached_process import accept_signals, end_with
from ksuit_runner.system.imports import own_process
from ksuit_runner.ui.lasting_output import secure_output


def main() -> int:
    """Execute the task that the starter sends, report how that ended, and return the exit status."""
    accept_signals()
    own_process()
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    task: RankTask = pickle.loads(connection.recv_bytes())
    end_with(int(sys.argv[2]), connection)
    secure_output()
    sys.argv[:], sys.path[:] = task.arguments, task.path
    end, status = _execute(task)
    with suppress(OSError):  # the starter is gone, and this process about to be
        connection.send_bytes(msgspec.msgpack.encode(end.report()))
    return status


def _execute(task: RankTask) -> tuple[RankEnd, int]:
    end = RankEnd()
    try:
        end.outcome = execute(task.start, BegunRuns(OutputPaths(task.start.config["output_dir"]), task.id))
        end.error, status = end.outcome.error, end.outcome.exit_status
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException as error:
        end.error, status = error, getattr(error, "exit_status", 1)
    if end.error is not None and not isinstance(end.error, KsuitError):
        end.trace = "".join(traceback.format_exception(end.error))
    return end, status


if __name__ == "__main__":
    sys.exit(main())
