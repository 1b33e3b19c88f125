"""What a process takes its surroundings for: another machine, a clock that is wrong, output that nobody reads."""

import os
import socket
import time
from typing import NamedTuple

from ksuit_runner.system import run_lock


class Surroundings(NamedTuple):
    """The surroundings of a process.

    Attributes:
        host: ``machine`` is another one, with processes and kernel locks of its own; ``container`` another one on the
            same kernel; empty for this one.
        clock_s: How far the clock is off, in seconds; after a second it is set right.
        has_reader: Whether somebody reads what is printed.
    """

    host: str = ""
    clock_s: float = 0.0
    has_reader: bool = True

    def enter(self) -> None:
        """Have this process see them, and locks of other hosts age in a second instead of half a minute."""
        run_lock.RunLock.__init__.__defaults__ = (1.0, 0.2)
        if self.host:
            socket.gethostname = lambda: self.host
        if self.host == "machine":
            run_lock._kernel = lambda: self.host
        if self.clock_s:
            self._set_clock()
        if not self.has_reader:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)

    def _set_clock(self) -> None:
        right, right_ns, begun = time.time, time.time_ns, time.monotonic()

        def off_s() -> float:
            return self.clock_s if time.monotonic() - begun < 1.0 else 0.0

        time.time = lambda: right() + off_s()
        time.time_ns = lambda: right_ns() + int(off_s() * 1e9)
