"""What a tracker that writes files has to remember of a run besides its metrics."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import RunId
from ksuit_runner.system.atomic_files import make_folder, write_text
from ksuit_runner.system.untrusted_files import MissingFileError, conform, read_json
from ksuit_runner.tracker.base import RunInfo

_NAME = "run.json"


class RunFile(msgspec.Struct, forbid_unknown_fields=True):
    """Identity, tags and parameters of a run, stored in the tracker's folder for a later process.

    Attributes:
        run_id: Id of the run in the output folder.
        name: Its name.
        start_time: When it was started, in ms since 1970.
        parent_run_id: Run that it is grouped under.
        status: RUNNING, or how it ended.
        tags: Its tags.
        params: Its parameters.
        datasets: Datasets that it uses, by name.
    """

    run_id: RunId
    name: str
    start_time: int
    parent_run_id: RunId | None = None
    status: str = "RUNNING"
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    params: dict[str, str] = msgspec.field(default_factory=dict)
    datasets: dict[str, str] = msgspec.field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, root: Path, run_id: str) -> RunFile | None:
        """Read what was stored in a tracker's folder for a run; None if nothing was.

        Raises:
            UnsafeFileError: It cannot be read.
            TrackerError: It is another run's.
        """
        try:
            found = conform(cls, read_json(folder / _NAME, root))
        except MissingFileError:
            return None
        if found.run_id != run_id:
            raise TrackerError(f"{folder / _NAME} is another run's: {found.run_id}")
        return found

    def store(self, folder: Path) -> None:
        """Write it to the tracker's folder: after a crash what was stored before is there, or this."""
        make_folder(folder)
        write_text(folder / _NAME, msgspec.json.format(msgspec.json.encode(self)).decode() + "\n")

    @property
    def info(self) -> RunInfo:
        """The run as trackers know it."""
        return RunInfo(self.run_id, self.name, self.status, dict(self.tags), self.parent_run_id, self.start_time)
