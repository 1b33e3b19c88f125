"""Points in the runner at which processes are killed or suspended, as SIGKILL or a power cut could at that moment."""

import importlib
import math
import os
from collections.abc import Callable
from functools import reduce, wraps
from typing import Any, NamedTuple

TRAINING, RECORDER = "training", "recorder"


class Point(NamedTuple):
    """A function in a module, when it is called: before it, after it, or in the middle of it; and in which process."""

    module: str
    function: str
    when: str
    process: str = TRAINING


_RECORDED_RUN = "ksuit_runner.recorder.recorded_run"

POINTS = {
    "before the run has a folder": Point("ksuit_runner.engine.run_record", "add_to_index", "before"),
    "before the config is stored": Point("ksuit_runner.engine.runner", "store", "before"),
    "while the config is stored": Point("ksuit_runner.system.atomic_files", "_replace", "after"),
    "when the config is stored": Point("ksuit_runner.record.stored_run", "write_texts", "after"),
    "before any data is read": Point("ksuit_runner.data.container", "DataContainer.check_repeatable", "before"),
    "at the start of training": Point("ksuit_runner.engine.hooks", "Hooks.evaluations", "before"),
    "fetching data": Point("ksuit_runner.data.container", "DataContainer.next_training_batch", "before"),
    "after the forward pass": Point("ksuit_runner.trainer.sgd", "SgdTrainer.forward", "after"),
    "after the backward pass": Point("ksuit_runner.trainer.update", "Update.backward", "after"),
    "in the optimizer's step": Point("ksuit_runner.trainer.fused_adam", "FusedStep.__call__", "after"),
    "after an update": Point("ksuit_runner.engine.agenda", "Agenda.after_update", "before"),
    "in an evaluation": Point("ksuit_runner.trainer.sgd", "SgdTrainer.evaluation", "after"),
    "in the middle of a line of the journal": Point("os", "write", "half"),
    "after a line of the journal": Point("ksuit_runner.record.journal", "Journal.append", "after"),
    "taking a snapshot": Point("ksuit_runner.checkpoint.host_buffers", "HostBuffers.copy", "after"),
    "writing a file of a checkpoint": Point("ksuit_runner.checkpoint.format", "write_file", "after"),
    "writing the manifest": Point("ksuit_runner.checkpoint.format", "write_head", "after"),
    "before the hand-over": Point("pathlib", "Path.rename", "before"),
    "after the hand-over": Point("pathlib", "Path.rename", "after"),
    "before the run is recorded": Point(_RECORDED_RUN, "RecordedRun.__init__", "before", RECORDER),
    "before the folder is followed": Point(_RECORDED_RUN, "RecordedRun.start", "before", RECORDER),
    "before the commit": Point("ksuit_runner.checkpoint.commit", "Committer._commit", "before", RECORDER),
    "after the commit": Point("ksuit_runner.checkpoint.commit", "Committer._commit", "after", RECORDER),
    "before one is dropped": Point("ksuit_runner.checkpoint.commit", "_drop", "before", RECORDER),
    "while a tiny checkpoint is unpacked": Point("ksuit_runner.checkpoint.packed", "_copy", "after", RECORDER),
    "before files are synced": Point("ksuit_runner.checkpoint.commit", "Committer._replace", "before", RECORDER),
    "between commit and read-back": Point("ksuit_runner.checkpoint.commit", "_read_back", "before", RECORDER),
    "between commit and latest": Point("ksuit_runner.checkpoint.commit", "write_text", "before", RECORDER),
    "between tags and latest": Point("ksuit_runner.checkpoint.commit", "write_text", "after", RECORDER),
    "while a file is replaced": Point("pathlib", "Path.replace", "before", RECORDER),
    "before old checkpoints are removed": Point(
        "ksuit_runner.checkpoint.commit", "Committer._prune", "before", RECORDER
    ),
    "removing an old checkpoint": Point("shutil", "rmtree", "before", RECORDER),
    "before metrics are sent": Point("ksuit_runner.tracker.mlflow", "MlflowTracker.log_points", "before", RECORDER),
    "after metrics were sent": Point("ksuit_runner.tracker.mlflow", "MlflowTracker.log_points", "after", RECORDER),
    "after training": Point("ksuit_runner.engine.loop", "finish_training", "after"),
    "before the record is closed": Point("ksuit_runner.engine.run_record", "RunRecord.close", "before"),
    "before the status is set": Point("ksuit_runner.tracker.mlflow", "MlflowTracker.end_run", "before", RECORDER),
    "after the status was set": Point("ksuit_runner.tracker.mlflow", "MlflowTracker.end_run", "after", RECORDER),
    "before a death is recorded": Point(_RECORDED_RUN, "RecordedRun.end_dead", "before", RECORDER),
    "before a dead run is KILLED": Point(
        "ksuit_runner.delivery.recording", "Recording.mark_if_killed", "before", RECORDER
    ),
    "before a dead lock is removed": Point("ksuit_runner.system.run_lock", "LockView.remove_dead", "before", RECORDER),
}
AFTER_DEATH = ("before a death is recorded", "before a dead run is KILLED", "before a dead lock is removed")
"""Points that the recorder reaches because the process that trains has died."""


def choose_writer(count: int) -> None:
    """Choose how checkpoints are written, whatever the speed of the disk.

    At once and handed over as one file, in the background one by one as those of large models are, or in the background
    with a queue.
    """
    checkpoint: Any = importlib.import_module("ksuit_runner.checkpoint.writer")
    if count % 3 == 1:
        checkpoint._QUICK_S = math.inf
    else:
        checkpoint.TINY = 0
    if count % 3 == 2:
        checkpoint._SMALL = 0


def strike_at(point: str, count: int, strike: Callable[[], None]) -> None:
    """Have something done when this process, and none of its workers, reaches a point for the n-th time."""
    module, name, when, _ = POINTS[point]
    *path, attribute = name.split(".")
    owner = reduce(getattr, path, importlib.import_module(module))
    setattr(owner, attribute, _striking(getattr(owner, attribute), when, count, os.getpid(), strike))


def _striking(
    function: Callable[..., Any], when: str, count: int, pid: int, strike: Callable[[], None]
) -> Callable[..., Any]:
    calls: list[int] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        is_half_line = when == "half" and isinstance(args[1], bytes) and args[1].startswith(b'{"c":"')
        if os.getpid() != pid or (when == "half" and not is_half_line):
            return function(*args, **kwargs)
        calls.append(1)
        if len(calls) == count and when != "after":
            if when == "half":
                function(args[0], args[1][: len(args[1]) // 2])
            strike()
        result = function(*args, **kwargs)
        if len(calls) == count and when == "after":
            strike()
        return result

    return call
