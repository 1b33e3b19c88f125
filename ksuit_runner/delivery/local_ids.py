"""A tracker that takes the ids that runs have in the output folder, and reads their files there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ksuit_runner.delivery.delivered import read_state
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.point import Point
from ksuit_runner.tracker.base import BaseTracker, RunInfo


class LocalIdTracker(BaseTracker):
    """Queries another tracker by the ids that runs have in the output folder; files are in that folder.

    Both ids are the same, except for a run that started while the tracker could not be reached.

    Args:
        tracker: The tracker that is queried.
        outputs: The output folder.

    Attributes:
        on_files: Called after files were added to the run's artifacts or removed from them.
    """

    def __init__(self, tracker: BaseTracker, outputs: OutputPaths) -> None:
        super().__init__()
        self._tracker = tracker
        self._outputs = outputs
        self.on_files: Callable[[], None] = lambda: None

    def last_steps(self, run_id: str | None = None) -> dict[str, int]:
        """Return the last recorded step of every metric."""
        known = self._known(run_id)
        return self._tracker.last_steps(known) if known else {}

    def history(self, key: str, run_id: str | None = None) -> list[Point]:
        """Return all recorded points of a metric in the order of their steps."""
        known = self._known(run_id)
        return self._tracker.history(key, known) if known else []

    @property
    def store(self) -> BaseTracker:
        """The tracker that is queried."""
        return self._tracker

    def upload(self, path: Path, artifact_path: str) -> None:
        """Copy a file or folder to the run's artifacts: into its folder at once, from there to the store behind it."""
        target = self._paths(self.run_id).artifacts_dir / artifact_path
        if path.resolve() != target.resolve():
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                shutil.copy2(path, target)
        self.on_files()

    def delete_artifacts(self, path: str) -> None:
        """Delete a file or folder of the run's artifacts."""
        target = self._paths(self.run_id).artifacts_dir / path
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        self.on_files()

    def download(self, artifact_path: str, destination: Path, run_id: str | None = None) -> Path:
        """Copy a file or folder of a run, from this run's folder or else from the store."""
        source = self._paths(run_id or self.run_id).artifacts_dir / artifact_path
        if not source.exists():
            known = self._known(run_id)
            if known is None:
                raise TrackerError(f"run {run_id or self.run_id} has no '{artifact_path}'")
            return self._tracker.download(artifact_path, destination, known)
        destination.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            return Path(shutil.copytree(source, destination / source.name, dirs_exist_ok=True))
        return Path(shutil.copy2(source, destination / source.name))

    def list_artifacts(self, path: str = "", run_id: str | None = None) -> list[str]:
        """Return what lies directly in one of the folders of a run, in this output folder or else in the store."""
        root = self._paths(run_id or self.run_id).artifacts_dir
        if not root.is_dir():
            known = self._known(run_id)
            return self._tracker.list_artifacts(path, known) if known else []
        folder = root / path
        return [str(item.relative_to(root)) for item in sorted(folder.iterdir())] if folder.is_dir() else []

    def find(self, query: str) -> list[RunInfo]:
        """Look up runs in the store."""
        return self._tracker.find(query)

    def children(self, run_id: str) -> list[RunInfo]:
        """Return the runs that are grouped under a run, oldest first."""
        known = self._known(run_id)
        return self._tracker.children(known) if known else []

    def where(self) -> str:
        """Say where the run is recorded and how to look at it."""
        return self._tracker.where()

    def check_key(self, key: str) -> None:
        """Check the name of a metric or parameter by the store's rules."""
        self._tracker.check_key(key)

    def _paths(self, run_id: str) -> PathProvider:
        return PathProvider(self._outputs.output_dir, run_id)

    def _known(self, run_id: str | None) -> str | None:
        """Return a run's id in the store, None if it is not registered there."""
        run_id = run_id or self.run_id
        state = read_state(self._paths(run_id))
        return run_id if state is None else state.tracker_id
