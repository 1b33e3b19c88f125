"""What ``evaluate=`` does: evaluating a stored run once, and saying what has come of it."""

import logging

from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.engine.loop import evaluate
from ksuit_runner.engine.run import Run
from ksuit_runner.engine.silent_record import SilentRecord
from ksuit_runner.errors import MOST_LISTED, Interrupted

_LOGGER = logging.getLogger(__name__)


def evaluate_only(run: Run, record: SilentRecord) -> None:
    """Run the evaluations of a stored run once; say which values differ from recorded ones, and where files are."""
    before = record.recorded(run.counter.update)
    if not any(isinstance(item, DatasetCallback) for item in run.hooks.callbacks.values()):
        _LOGGER.warning("none of the callbacks evaluates a dataset. Choose some: 'callbacks=[accuracy]'")
    try:
        evaluate(run)
    except Interrupted as error:
        run.meeting.after(error)
        run.share_signal([error.number])
    for key, summary in run.log_writer.summary.items():
        if summary.last != before.get(key, summary.last):
            _LOGGER.warning("%s was %.6g before, which stays recorded; now it is %.6g", key, before[key], summary.last)
    files = run.log_writer.written_files
    for path in files[:MOST_LISTED]:
        _LOGGER.info("file: %s", path)
    if len(files) > MOST_LISTED:
        _LOGGER.info("and %d more files in %s", len(files) - MOST_LISTED, record.paths.artifacts_dir)
