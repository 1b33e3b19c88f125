"""Finishes what the dead process of a run has left, before its checkpoints are read; imports no torch."""

import time
from contextlib import suppress

from ksuit_runner.checkpoint.commit import Committer
from ksuit_runner.checkpoint.folders import needs_recovery
from ksuit_runner.errors import KsuitError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import JournalReader
from ksuit_runner.system.run_lock import RunLock, is_held

_LOOK_S, _RECORDER_S = 0.02, 5.0


def recover(paths: PathProvider, lock: RunLock) -> None:
    """Commit what a run's dead process has handed over, and clean up after it; for the owner of the run's lock."""
    Committer(paths, lock.check, JournalReader(paths.journal).sync).recover()


def recover_idle(paths: PathProvider) -> None:
    """Do the same for a run that is only read; one that is running ensures it itself.

    Right after the death of a run, its recorder does: it is waited for, for a bounded time, and not disturbed.
    """
    deadline = time.monotonic() + _RECORDER_S
    while (is_needed := needs_recovery(paths)) and is_held(paths.recorder_lock) and not is_held(paths.lock):
        if time.monotonic() > deadline:
            return
        time.sleep(_LOOK_S)
    if is_needed:
        with suppress(KsuitError, OSError), RunLock(paths.lock) as lock:
            recover(paths, lock)
