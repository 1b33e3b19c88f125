"""Sends a tracker everything that it lacks of a run."""

from ksuit_runner.delivery.artifact_mirror import Mirror
from ksuit_runner.delivery.deferred import DeferredTracker
from ksuit_runner.delivery.metric_sender import Shipment
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import Journal


def send_all(tracker: DeferredTracker, paths: PathProvider) -> str:
    """Send what a tracker lacks of the run that it is attached to, and return a line that says what that was.

    Raises:
        TrackerError: It cannot be reached; what was sent until then stays.
    """
    info = tracker.run
    was_behind = tracker.has_end
    tracker.deliver()
    journal = Journal(paths.journal)
    try:
        points = Shipment(journal, paths.journal_sent, tracker).send()
    finally:
        journal.close()
    files = 0
    if not tracker.artifacts_are_local:
        mirror = Mirror(tracker.store, paths, are_metrics_sent=lambda: True)
        files = mirror.update() + mirror.upload_log()
    tracker.deliver_end()
    status = f", status {tracker.status}" if was_behind else ""
    what = f"{points} metric points, {files} files and checkpoints{status}"
    return f"run {info.name} ({paths.run_id}): sent {what}\nEverything is recorded: {tracker.where()}"
