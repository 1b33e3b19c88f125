"""What is stored of a run, for those who show it; nothing is changed, and no tracker is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from omegaconf import OmegaConf

from ksuit_runner.checkpoint.folders import names, read_tags
from ksuit_runner.config.compose import without_sweep
from ksuit_runner.config.flatten import flatten
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.errors import KsuitError, TrackerError
from ksuit_runner.metric_property import MetricPropertyProvider, Summary
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.journal import read_points
from ksuit_runner.record.point import now
from ksuit_runner.record.stored_run import IndexEntry, Launch, entries, read_config, read_launch
from ksuit_runner.system.run_lock import seems_held
from ksuit_runner.system.untrusted_files import UnsafeFileError, read_json, read_text
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.tracker.start_tags import NOTES_TAG, TAGS_TAG


def stored_runs(outputs: OutputPaths) -> list[StoredRun]:
    """Return the runs of an output folder, the newest first."""
    known = {entry.run_id: entry for entry in entries(outputs)}
    newest = sorted(known.values(), key=lambda entry: entry.start_time, reverse=True)
    return [StoredRun(PathProvider(outputs.output_dir, entry.run_id), entry) for entry in newest]


@dataclass(frozen=True)
class StoredRun:
    """A run as its folder has it.

    Attributes:
        paths: Its files.
        entry: What the index of the output folder has of it, if that was read.
    """

    paths: PathProvider
    entry: IndexEntry | None = None

    @cached_property
    def _stored_box(self) -> Outbox | None:
        """What is to be delivered of it; None if that is damaged."""
        try:
            return Outbox.load(self.paths) or Outbox(self.paths.run_id, self.paths.run_id[:8])
        except TrackerError:
            return None

    @property
    def _box(self) -> Outbox:
        return self._stored_box or Outbox(self.paths.run_id, self.paths.run_id[:8])

    @property
    def name(self) -> str:
        """Its name."""
        return self._box.name if self.entry is None else self.entry.name

    @property
    def notes(self) -> str:
        """What its user says of it."""
        return self._told.get(NOTES_TAG, "")

    @property
    def tags(self) -> str:
        """Words that its user has given it, with commas between them."""
        return self._told.get(TAGS_TAG, "")

    @property
    def _told(self) -> dict[str, str]:
        return self._box.all_tags

    @property
    def status(self) -> str:
        """How it ended; RUNNING while its process is alive, KILLED if that is gone without a word; or DAMAGED."""
        return self.recorded_status or ("RUNNING" if seems_held(self.paths.lock) else EndStatus.KILLED)

    @property
    def recorded_status(self) -> str | None:
        """How it has said that it ended, or DAMAGED; None if it has not said so."""
        return "DAMAGED" if self._stored_box is None else self._box.status

    @property
    def started(self) -> datetime | None:
        """When it was started."""
        if self.entry is not None:
            return datetime.fromtimestamp(self.entry.start_time)
        return None if self._box.start_time is None else datetime.fromtimestamp(self._box.start_time / 1000)

    @property
    def age(self) -> timedelta | None:
        """The time since it was started."""
        return None if self.started is None else max(timedelta(0), datetime.now() - self.started)

    @property
    def took(self) -> timedelta | None:
        """How long it ran, or has been running, without the time between an end and a resume; None if not known.

        A killed run that nobody saw die ran at least until it last logged something; if it never has, nothing is known.
        """
        end = now() if self.status == "RUNNING" else self._box.end_time
        end = self._box.last_sign(self.paths) if end is None else end
        ran_ms = None if end is None else self._box.ran_until(end)
        return timedelta(milliseconds=ran_ms) if ran_ms else None

    @cached_property
    def launch(self) -> Launch:
        """How it was started; an error if that is damaged."""
        return read_launch(self.paths)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config, as plain values; an error if that is damaged."""
        return dict(OmegaConf.to_container(without_sweep(read_config(self.paths))))  # type: ignore[arg-type]

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Python, platform, git commit and versions of packages that it was started with, by their names."""
        try:
            found = read_json(self.paths.environment, self.paths.runs_dir)
        except UnsafeFileError:
            return {}
        if not isinstance(found, Mapping):
            return {}
        kept = {key: value for key, value in found.items() if key not in ("command", "folder", "versions", "packages")}
        packages = found.get("packages")
        return flatten({**kept, **(packages if isinstance(packages, Mapping) else {})})

    @cached_property
    def diff(self) -> str:
        """The uncommitted changes of the code that it was started with, as git writes them; empty if none are known."""
        try:
            return read_text(self.paths.diff, self.paths.runs_dir)
        except UnsafeFileError:
            return ""

    @cached_property
    def points(self) -> dict[str, dict[int, float]]:
        """The values of each metric by its key, by update."""
        found: dict[str, dict[int, float]] = {}
        if self.paths.journal.is_file():
            for point in read_points(self.paths.journal):
                found.setdefault(point.key, {})[point.step] = point.value
        return found

    @cached_property
    def metrics(self) -> dict[str, Summary]:
        """Last and best value of each metric."""
        directions, summaries = self._directions(), {}
        for key, values in self.points.items():
            for step, value in values.items():
                if key not in summaries:
                    summaries[key] = Summary(directions.direction(key), value, step)
                summaries[key].add(value, step)
        return summaries

    @cached_property
    def objective(self) -> str | None:
        """The metric that it is judged by: ``objective``, or the first that a callback selects by; None if none is."""
        if key := self.config.get("objective"):
            return str(key)
        callbacks = [node for node in (self.config.get("callbacks") or {}).values() if isinstance(node, Mapping)]
        watched = (str(node["metric_key"]) for node in callbacks if node.get("metric_key"))
        return next((key for key in watched if self._directions().direction(key) != "neutral"), None)

    @property
    def judged(self) -> tuple[str, float | None]:
        """The metric that it is judged by, empty if none is, and its best value, None if there is none yet.

        Where its files are damaged, there is neither: a list of runs says of them what it can.
        """
        try:
            summary = self.metrics.get(self.objective or "")
            return self.objective or "", None if summary is None else summary.best
        except KsuitError:
            return "", None

    def _directions(self) -> MetricPropertyProvider:
        node = self.config.get("metric_property_provider")
        given = {key: value for key, value in node.items() if key in ("higher", "lower", "neutral")} if node else {}
        return MetricPropertyProvider(**given)

    @property
    def checkpoints(self) -> dict[str, list[str]]:
        """The tags of each checkpoint by its name, newest first."""
        tags = read_tags(self.paths)
        return {name: [tag for tag, at in tags.items() if at == name] for name in names(self.paths)}
