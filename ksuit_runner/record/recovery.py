"""Finishes what the dead process of a run has left, before its checkpoints are read; imports no torch."""

from contextlib import suppress

from ksuit_runner.checkpoint.commit import Committer
from ksuit_runner.checkpoint.folders import needs_recovery
from ksuit_runner.errors import KsuitError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import JournalReader
from ksuit_runner.system.run_lock import RunLock


def recover(paths: PathProvider, lock: RunLock) -> None:
    """Commit what a run's dead process has handed over, and clean up after it; for the owner of the run's lock."""
    Committer(paths, lock.check, JournalReader(paths.journal).sync).recover()


def recover_idle(paths: PathProvider) -> None:
    """Do the same for a run that is only read; one that is running ensures it itself."""
    if needs_recovery(paths):
        with suppress(KsuitError, OSError), RunLock(paths.lock) as lock:
            recover(paths, lock)
