"""A fake environment for a process: another host, a wrong clock, output that nobody reads."""

import os
import socket
import time
from typing import NamedTuple

from ksuit_runner.system import lock_file, run_lock


class FakeEnvironment(NamedTuple):
    """What a process sees of its host.

    Attributes:
        host: ``machine`` is another one, with processes and kernel locks of its own; ``container`` another one on the
            same kernel; empty for this one.
        clock_s: Error of the clock in seconds; it is corrected after a second.
        has_reader: Whether somebody reads what is printed.
    """

    host: str = ""
    clock_s: float = 0.0
    has_reader: bool = True

    def enter(self) -> None:
        """Apply it to this process, where locks of other hosts also expire in a second instead of half a minute."""
        run_lock.RunLock.__init__.__defaults__ = (1.0, 0.2)
        if self.host:
            socket.gethostname = lambda: self.host
        if self.host == "machine":
            lock_file.kernel = lambda: self.host
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
