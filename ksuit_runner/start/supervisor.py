"""Starts the ranks of a run as processes of this machine, and stays with them until all have ended."""

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

from ksuit_runner.distributed.environment import STARTER, STORE_SOCKET
from ksuit_runner.start.supervised_rank import SETTLES_S, Report, SupervisedRank
from ksuit_runner.system.cores import core_count
from ksuit_runner.system.detached_process import start_detached
from ksuit_runner.system.gpus import gpu_of_rank
from ksuit_runner.system.signals import SIGNALS, Interruption, catch_signals

_HOST = "127.0.0.1"
_LOOK_S = 0.2
_AT_ONCE_S = 5.0  # after a second Ctrl-C
_OTHERS_S = 60.0  # for the end of a rank once nothing is left to do for it
_RECORDS_S = 600.0  # for what the others still save and record after an error on one rank


@dataclass(frozen=True)
class Lost:
    """The rank because of which the others cannot continue.

    Attributes:
        text: Which one it is, and what has become of it.
        exit_status: Exit status of the command if that is the end.
    """

    text: str
    exit_status: int


@dataclass
class Ended:
    """How the ranks have ended.

    Attributes:
        reports: What they had to say, by rank; None for one that was killed.
        statuses: Their exit statuses, negative numbers of signals for those that were killed.
        signal: Number of the first signal that asked them to end.
        lost: The one that was killed or stuck; None unless that is why they have ended.
    """

    reports: list[Report | None]
    statuses: list[int]
    signal: int | None = None
    lost: Lost | None = None


class _Relay(Interruption):
    """Hands signals on to the ranks: the first one, and every Ctrl-C.

    Attributes:
        ranks: The ranks.
        interrupts: How often Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ranks: list[SupervisedRank] = []
        self.interrupts = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Hand a signal on."""
        is_first = self.signal is None
        self.signal = self.signal or number
        self.interrupts += number == signal.SIGINT
        if is_first or number == signal.SIGINT:
            self.hand_on(number)

    def hand_on(self, number: int) -> None:
        """Send a signal to all ranks."""
        for rank in self.ranks:
            rank.hand_on(number)


class Supervisor:
    """Starts the ranks of a run, hands signals on to them, and starts them again when one was killed or is stuck.

    A rank that fails says so to the others, and all of them end by themselves. Here they are only waited for, each for
    a bounded time. Nobody saves after one is lost: the others are killed, and all begin again from the last checkpoint.

    Args:
        command: What each of them executes. It is followed by the file descriptor of a ``Connection``, which brings the
            task and takes a ``Report``, and the process id of this process.
        size: Number of ranks.
        max_restarts: How often they may be started again.
        say: Tells the user something.
        environment: Their environment, to which their place is added.
        options: Further arguments of ``subprocess.Popen``.
    """

    def __init__(
        self,
        command: Sequence[str],
        size: int,
        max_restarts: int,
        say: Callable[[str], None],
        environment: Mapping[str, str] = os.environ,
        **options: Any,
    ) -> None:
        self._command = command
        self._size = size
        self._max_restarts = max_restarts
        self._say = say
        self._given = environment
        self._options = options
        self._relay = _Relay()

    def run(self, task: bytes) -> Ended:
        """Have the ranks execute a task.

        Raises:
            OSError: A process cannot be started.
        """
        with catch_signals(self._relay):
            restarts = 0
            while True:
                ended = self._attempt(task)
                if ended.lost is None or restarts >= self._max_restarts:
                    return ended
                restarts += 1
                self._say(
                    f"{ended.lost.text}: all ranks start again ({restarts} of at most {self._max_restarts} times)"
                )

    def _attempt(self, task: bytes) -> Ended:
        ranks: list[SupervisedRank] = []
        try:
            self._start(ranks)
            for rank in ranks:
                rank.give(task)
            self._accompany(ranks)
        finally:
            self._relay.ranks = []
            statuses = [rank.end() for rank in ranks]
        lost = _lost(ranks) if self._relay.signal is None else None
        return Ended([rank.report for rank in ranks], statuses, self._relay.signal, lost)

    def _start(self, ranks: list[SupervisedRank]) -> None:
        """Start the ranks; a signal meanwhile waits until all are there to get it."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        asked = self._relay.signal
        try:
            with socket.create_server((_HOST, 0), backlog=4 * self._size) as door:
                for number in range(self._size):
                    ranks.append(self._start_one(number, door))
            self._relay.ranks = ranks
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if asked is not None:
            self._relay.hand_on(asked)

    def _start_one(self, number: int, door: socket.socket) -> SupervisedRank:
        ours, theirs = Pipe()
        with theirs:
            process = start_detached(
                [*self._command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno(), *([door.fileno()] if number == 0 else ())],
                env=self._environment(number, door),
                **self._options,
            )
        return SupervisedRank(number, process, ours)

    def _environment(self, rank: int, door: socket.socket) -> dict[str, str]:
        threads = str(max(1, core_count() // self._size))
        return {
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # of connections to a rank that is gone
            "OMP_NUM_THREADS": threads,
            **self._given,
            **gpu_of_rank(rank, self._given),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._size),
            "LOCAL_WORLD_SIZE": str(self._size),
            "MASTER_ADDR": _HOST,
            "MASTER_PORT": str(door.getsockname()[1]),
            **({STORE_SOCKET: str(door.fileno())} if rank == 0 else {}),
            STARTER: f"ranks={self._size}",
        }

    def _accompany(self, ranks: Sequence[SupervisedRank]) -> None:
        """Wait until all ranks have ended, one was killed, or those that are left have had their time."""
        failed_at: float | None = None
        at_once_at: float | None = None
        while any(rank.status is None for rank in ranks):
            _wait(ranks)
            for rank in ranks:
                rank.look()
                if rank.status is not None and -rank.status in SIGNALS and self._relay.signal is None:
                    self._relay.handle(-rank.status, None)  # it was not ready to tell the others
            now = time.monotonic()
            if any(rank.was_killed for rank in ranks):
                return
            if self._relay.interrupts > 1:
                at_once_at = at_once_at or now
                if self._relay.interrupts > 2 or now - at_once_at > _AT_ONCE_S:
                    return
            if ranks[0].status is not None or any(rank.has_failed for rank in ranks):
                failed_at = failed_at or now
                _give_up(ranks, now - failed_at)


def _wait(ranks: Sequence[SupervisedRank]) -> None:
    """Wait a moment for news of a rank."""
    if wait([rank.connection for rank in ranks if rank.status is None], _LOOK_S):
        time.sleep(SETTLES_S)  # one that is about to end has closed its connection already


def _give_up(ranks: Sequence[SupervisedRank], waited_s: float) -> None:
    """Kill the ranks that do not end although others have: those that stand still, and those that take too long."""
    limit_s = _RECORDS_S if _has_cause(ranks) and ranks[0].status is None else _OTHERS_S
    for rank in ranks:
        if rank.status is None and (waited_s > limit_s or rank.watch.is_suspended()):
            rank.give_up()


def _has_cause(ranks: Sequence[SupervisedRank]) -> bool:
    """Whether a rank has failed of something else than the others."""
    return any(rank.has_failed and rank.report is not None and not rank.report.blames_others for rank in ranks)


def _lost(ranks: Sequence[SupervisedRank]) -> Lost | None:
    """Return the rank that was killed or is stuck, if that is why they have ended."""
    for rank in ranks:
        if rank.was_killed:
            assert rank.status is not None
            reason = rank.reason or signal.Signals(-rank.status).name
            return Lost(f"rank {rank.number} was killed ({reason})", 128 - rank.status)
    stuck = [rank for rank in ranks if rank.is_given_up]
    if not stuck or _has_cause(ranks):
        return None
    return Lost(f"rank {stuck[0].number} did not react any more and was killed", 1)
