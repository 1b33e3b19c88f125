"""Several trackers that record the same runs."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.point import LoggedFile, Point, now
from ksuit_runner.tracker.base import BaseTracker, DatasetInfo, EndStatus, ModelVersion, RunInfo
from ksuit_runner.tracker.follower import Follower, Message


class SeveralTrackers(BaseTracker):
    """Records runs by a tracker, and by others beside it.

    The first one decides: ids are its ids, it is asked for everything that is looked up, and it stores the files. It is
    sent everything first, and while it fails, the others wait. Each of the others gets parameters, tags, datasets,
    metrics and the end of the run; one that fails delays no other, and gets later what it lacks (see ``Follower``).

    Args:
        output_paths: The output folder.
        first: The first tracker.
        others: The trackers beside it, by their names in the config.
    """

    def __init__(self, output_paths: OutputPaths, first: BaseTracker, others: Mapping[str, BaseTracker]) -> None:
        super().__init__()
        self._outputs = output_paths
        self._first = first
        self._followers = {name: Follower(name, tracker) for name, tracker in others.items()}
        trackers = (first, *others.values())
        self.has_registry, self.may_be_away = first.has_registry, first.may_be_away
        self.require = any(tracker.require for tracker in trackers)
        self.close_timeout_s = max(tracker.close_timeout_s for tracker in trackers)

    @property
    def artifacts_are_local(self) -> bool:
        """Whether the first tracker needs no upload."""
        return self._first.artifacts_are_local

    def warm_up(self) -> None:
        """Import and prepare what the first calls of all trackers need."""
        for tracker in self._all():
            tracker.warm_up()

    def check_answer(self) -> None:
        """Check that the first tracker answers; a run that is resumed does not wait for the others."""
        self._first.check_answer()

    def start_run(
        self,
        name: str | None,
        tags: Mapping[str, str],
        parent_run_id: str | None = None,
        start_time: int | None = None,
    ) -> RunInfo:
        """Start a run in all trackers; one that is registered later is under way, and requires only the first."""
        info = self._follow(self._first.start_run(name, tags, parent_run_id, start_time))
        if start_time is None:
            try:
                for follower in self._followers.values():
                    follower.join()
            except TrackerError:
                with suppress(TrackerError):
                    self._first.end_run(EndStatus.FAILED)
                raise
        return info

    def resume_run(self, run_id: str) -> RunInfo:
        """Bind the first tracker to a run that exists and mark it RUNNING again; the others with their next message."""
        return self._follow(self._first.resume_run(run_id), is_resumed=True)

    def attach_run(self, run_id: str) -> RunInfo:
        """Bind the first tracker to a run that exists; the others get to know it when there is something to record."""
        return self._follow(self._first.attach_run(run_id))

    def end_run(self, status: EndStatus, end_time: int | None = None) -> None:
        """Mark the run as ended, now or at a time in ms since 1970."""
        end_time = end_time or now()
        self._first.end_run(status, end_time)
        self._send(Message(end=(status, end_time)))

    def delete_run(self) -> None:
        """Delete the run in all trackers that can; in the first one last, since without it the others are not asked.

        Raises:
            TrackerError: One of them cannot be reached.
        """
        self._send(Message(is_withdrawn=True))
        self.deliver_end()
        self._first.delete_run()

    def log_points(self, points: Sequence[Point]) -> None:
        """Record metric points, at most 1000; one that is recorded already changes nothing."""
        self._first.log_points(points)
        self._send(Message(points=list(points)))

    def log_files(self, files: Sequence[LoggedFile]) -> None:
        """Show images, tables and the like in all trackers that can."""
        self._first.log_files(files)
        self._send(Message(files=list(files)))

    @property
    def is_behind(self) -> bool:
        """Whether one of the others lacks something."""
        return any(follower.is_behind for follower in self._followers.values())

    def deliver(self) -> None:
        """Have the others record what they lack, if it is time to try again; none delays the first."""
        for follower in self._followers.values():
            follower.catch_up()

    def deliver_end(self) -> None:
        """Have the others record what they lack.

        Raises:
            TrackerError: One of them cannot.
        """
        late = [follower.reason for follower in self._followers.values() if not follower.catch_up(is_last=True)]
        if late:
            raise TrackerError("; ".join(late))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; one that is recorded already keeps its value."""
        self._first.log_params(params)
        self._send(Message(params={key: str(value) for key, value in params.items()}))

    def set_tags(self, tags: Mapping[str, str], run_id: str | None = None) -> None:
        """Set tags of the run, or of another one in the first tracker."""
        self._first.set_tags(tags, run_id)
        if run_id in (None, self.run_id):
            self._send(Message(tags=dict(tags)))

    def log_inputs(self, datasets: Sequence[DatasetInfo]) -> None:
        """Record which datasets the run uses."""
        self._first.log_inputs(datasets)
        self._send(Message(inputs=list(datasets)))

    def register_model(self, version: ModelVersion) -> None:
        """Add a version to a registered model in the first tracker."""
        self._first.register_model(version)

    def last_steps(self, run_id: str | None = None) -> dict[str, int]:
        """Return the last recorded step of every metric."""
        return self._first.last_steps(run_id)

    def history(self, key: str, run_id: str | None = None) -> list[Point]:
        """Return all recorded points of a metric in the order of their steps."""
        return self._first.history(key, run_id)

    def upload(self, path: Path, artifact_path: str) -> None:
        """Copy a file or folder to the run's artifacts, unless it is there already."""
        self._first.upload(path, artifact_path)

    def download(self, artifact_path: str, destination: Path, run_id: str | None = None) -> Path:
        """Copy a file or folder from the run's artifacts into a folder, under its own name, and return its new path."""
        return self._first.download(artifact_path, destination, run_id)

    def list_artifacts(self, path: str = "", run_id: str | None = None) -> list[str]:
        """Return the paths, below the artifact root, of what lies directly in one of its folders."""
        return self._first.list_artifacts(path, run_id)

    def delete_artifacts(self, path: str) -> None:
        """Delete a file or folder of the run's artifacts; one that does not exist is not an error."""
        self._first.delete_artifacts(path)

    def find(self, query: str) -> list[RunInfo]:
        """Look up runs without creating or changing anything."""
        return self._first.find(query)

    def children(self, run_id: str) -> list[RunInfo]:
        """Return the runs that are grouped under a run, oldest first."""
        return self._first.children(run_id)

    def where(self) -> str:
        """Say where the run is recorded and how to look at it."""
        return "\n".join(tracker.where() for tracker in self._all())

    def check_key(self, key: str) -> None:
        """Check that no tracker refuses the name of a metric or parameter."""
        for tracker in self._all():
            tracker.check_key(key)

    def _all(self) -> Iterable[BaseTracker]:
        return self._first, *(follower.tracker for follower in self._followers.values())

    def _follow(self, info: RunInfo, is_resumed: bool = False) -> RunInfo:
        paths = PathProvider(self._outputs.output_dir, info.local_id)
        for name, follower in self._followers.items():
            follower.follow(info, paths.backlog(name), is_resumed)
        self._run = info
        return info

    def _send(self, message: Message) -> None:
        for follower in self._followers.values():
            follower.record(message)
