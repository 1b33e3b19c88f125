"""The process of a rank, as the one that has started it sees it: its task, its report, its end."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import msgspec

from ksuit_runner.system.process_watch import ProcessWatch
from ksuit_runner.system.signals import SIGNALS

SETTLES_S = 0.01
"""How long a process whose connection is closed may still take to end, in seconds."""


class Report(msgspec.Struct):
    """What a rank says at its end.

    Attributes:
        blames_others: Whether it has ended only because another rank has failed or is lost.
        content: Whatever else there is to say, for those who have started it.
    """

    blames_others: bool
    content: bytes


@dataclass(eq=False)
class SupervisedRank:
    """The process of a rank, as the one that has started it sees it.

    Attributes:
        number: Number of the rank.
        process: Its process, which leads a group: its data workers belong to that, and the recorder does not.
        connection: Gives it its task, brings its report, and is closed at the latest when one of both ends.
        report: Its report.
        status: Its exit status, once it has ended.
        reason: What has killed it.
        is_given_up: Whether it is killed because it does not end.
    """

    number: int
    process: subprocess.Popen[bytes]
    connection: Connection
    watch: ProcessWatch = field(init=False)
    report: Report | None = None
    status: int | None = None
    reason: str | None = None
    is_given_up: bool = False

    def __post_init__(self) -> None:
        self.watch = ProcessWatch(self.process.pid)

    def give(self, task: bytes) -> None:
        """Give it its task."""
        with suppress(OSError):  # it has ended; that is noticed
            self.connection.send_bytes(task)

    def look(self) -> None:
        """Take its report, and notice its end."""
        if self.status is not None:
            return
        has_ended = self._has_ended()
        with suppress(EOFError, OSError):
            while self.connection.poll():
                self.report = msgspec.msgpack.decode(self.connection.recv_bytes(), type=Report)
        if has_ended:
            self.reason = self.watch.reason()
            self.kill()  # its data workers
            self.status = self.process.wait()
            self.watch.close()
            self.connection.close()

    def _has_ended(self) -> bool:
        """Whether it has ended, while its process id is still its own where the system tells without taking it."""
        if not hasattr(os, "waitid"):
            return self.process.poll() is not None
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self) -> int:
        """Kill it if it has not ended, and return its exit status."""
        if self.status is None:
            self.give_up()
        while self.status is None:
            self.look()
            time.sleep(SETTLES_S)
        return self.status

    def give_up(self) -> None:
        """Kill it because it does not end."""
        self.is_given_up = True
        self.kill()

    def kill(self) -> None:
        """Kill it, and its data workers."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def hand_on(self, number: int) -> None:
        """Send it a signal."""
        if self.status is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    @property
    def was_killed(self) -> bool:
        """Whether something else has killed it, before its report, than a signal that asked it to end."""
        if self.status is None or self.is_given_up or self.report is not None:
            return False
        return self.status < 0 and -self.status not in SIGNALS

    @property
    def has_failed(self) -> bool:
        """Whether it has ended, and neither done its work nor followed a signal."""
        asked = (0, *(128 + number for number in SIGNALS), *(-number for number in SIGNALS))
        return self.status is not None and self.status not in asked
