"""Fetches a run from its tracker to a machine that does not have it."""

import shutil

from ksuit_runner.checkpoint.folders import newest_tags, read_tags
from ksuit_runner.config.factory import Factory
from ksuit_runner.delivery.artifact_mirror import Mirror
from ksuit_runner.delivery.delivered import Delivery
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.delivery.tracked_points import tracked_points, write_points
from ksuit_runner.errors import ResumeError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.stored_run import add_to_index
from ksuit_runner.system.atomic_files import commit_folder, make_folder, write_json
from ksuit_runner.system.untrusted_files import check_folder, remove
from ksuit_runner.tracker.base import KIND_TAG, BaseTracker, EndStatus, RunInfo


def fetch_by(factory: Factory, outputs: OutputPaths, query: str) -> str | None:
    """Fetch a run from the server of the tracker in a config, if it has one; see ``fetch``."""
    if not (factory.node("tracker") or {}).get("uri"):
        return None
    from ksuit_runner.recorder.tracker import open_tracker

    return fetch(open_tracker(factory, outputs), outputs, query)


def fetch(tracker: BaseTracker, outputs: OutputPaths, query: str) -> str | None:
    """Look a run up in the tracker's store and fetch what a resume needs: config, metrics and checkpoints.

    The run's folder appears when it is complete; an interrupted fetch starts over.

    Args:
        tracker: The tracker, bound to no run.
        outputs: The output folder.
        query: The run's id, the first 6 or more characters of it, its name, or ``last``.

    Returns:
        Id of the run in the output folder, or None if there is no such run.

    Raises:
        ResumeError: Several runs match.
        TrackerError: Something could not be read.
    """
    found = tracker.find(query)
    if len(found) > 1:
        raise ResumeError(f"'{query}' matches {len(found)} runs: {', '.join(info.run_id for info in found[:4])}")
    if not found:
        return None
    (info,) = found
    run = PathProvider(outputs.output_dir, info.local_id)
    if not run.run_dir.exists():
        remove(outputs.fetching_dir)
        temporary = PathProvider(outputs.fetching_dir, info.local_id)
        _fill(tracker, info, temporary)
        check_folder(temporary.run_dir)
        make_folder(run.runs_dir)
        commit_folder(temporary.run_dir, run.run_dir)
        shutil.rmtree(outputs.fetching_dir, ignore_errors=True)
        start_time, tracker_id = info.start_time / 1000, info.run_id if info.run_id != info.local_id else None
        add_to_index(outputs, info.local_id, info.name, info.tags.get(KIND_TAG, Mode.TRAIN), start_time, tracker_id)
    return info.local_id


def _fill(tracker: BaseTracker, info: RunInfo, run: PathProvider) -> None:
    for path in (run.config, run.launch):
        tracker.download(path.name, run.artifacts_dir, info.run_id)
    there = tracker.list_artifacts("", info.run_id)
    for path in (run.signature, run.checkpoints_dir):  # a run without checkpoints starts over
        if path.name in there:
            tracker.download(path.name, run.artifacts_dir, info.run_id)
    journal = Journal(run.journal)
    write_points(journal, tracked_points(tracker, info.run_id))
    run.journal_sent.write_text(str(journal.size))
    journal.close()
    tags = {key: value for key, value in info.tags.items() if not key.startswith("mlflow.")}
    box = Outbox(info.local_id, info.name, info.run_id, info.start_time, info.parent_run_id, tags)
    box.status = EndStatus.of(info.status)
    box.store(run)
    Delivery(info.run_id, box.version, box.status).store(run)
    Mirror(tracker, run, lambda: True).adopt()
    if (tags := newest_tags(run)) != read_tags(run):  # the machine was lost before they were uploaded
        write_json(run.tags, tags)
