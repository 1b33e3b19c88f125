"""What a run takes from the stored one that it starts from, before it is built: its lock, and its checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager

from ksuit_runner.checkpoint.folders import has_traces
from ksuit_runner.checkpoint.format import Checkpoint, read_newest
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import ResumeError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.origin import Origin
from ksuit_runner.record.recovery import recover
from ksuit_runner.record.stored_run import read_launch
from ksuit_runner.system.recorder_lock import StoredRunLock
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.system.untrusted_files import check_folder


@contextmanager
def locked_stored_run(outputs: OutputPaths, origin: Origin | None) -> Iterator[RunLock | None]:
    """Lock a stored run that is resumed or evaluated while the block runs, before anything of it is read.

    Raises:
        AliveError: A process that is alive holds it.
    """
    if origin is None or origin.mode == Mode.FORK:
        yield None
        return
    paths = PathProvider(outputs.output_dir, origin.run_id)
    check_folder(paths.run_dir)
    with StoredRunLock(paths.lock, paths.recorder_lock) as lock:
        recover(paths, lock)
        yield lock


def read_checkpoint(outputs: OutputPaths, origin: Origin | None, world: World) -> Checkpoint | None:
    """Read the checkpoint to start from; a run that was killed before its first one starts over."""
    if origin is None:
        return None
    paths = PathProvider(outputs.output_dir, origin.run_id)
    is_there = _has_checkpoint(paths, origin) if world.records else None
    is_there = world.exchange(f"{origin.mode} of run {origin.run_id}", is_there)[0]
    return read_newest(paths, origin.checkpoint, world, origin.mode == Mode.FORK) if is_there else None


def _has_checkpoint(paths: PathProvider, origin: Origin) -> bool:
    if origin.mode != Mode.RESUME or has_traces(paths):
        return True
    if paths.launch.exists() and read_launch(paths).mode == Mode.FORK:
        raise ResumeError(f"run {origin.run_id} was killed while it was forked, before it began: fork again")
    return False
