"""Points in the runner at which a process kills itself, as SIGKILL or a power cut could at that moment."""

import importlib
import math
import os
import signal
from collections.abc import Callable
from functools import reduce, wraps
from typing import Any

POINTS = {
    # point: (module, function in it), and when: before it, after it, or in the middle of it
    "before the run has a folder": ("ksuit_runner.engine.run_record", "add_to_index", "before"),
    "before the config is stored": ("ksuit_runner.engine.runner", "store", "before"),
    "while the config is stored": ("ksuit_runner.record.stored_run", "write_text", "after"),
    "before any data is read": ("ksuit_runner.data.container", "DataContainer.check_repeatable", "before"),
    "at the start of training": ("ksuit_runner.engine.hooks", "Hooks.evaluations", "before"),
    "fetching data": ("ksuit_runner.data.container", "DataContainer.next_training_batch", "before"),
    "after the forward pass": ("ksuit_runner.trainer.sgd", "SgdTrainer.forward", "after"),
    "after the backward pass": ("ksuit_runner.trainer.sgd", "SgdTrainer.backward", "after"),
    "in the optimizer's step": ("ksuit_runner.trainer.fused_adam", "FusedStep.__call__", "after"),
    "after an update": ("ksuit_runner.engine.hooks", "Hooks.methods_after_update", "before"),
    "in an evaluation": ("ksuit_runner.trainer.sgd", "SgdTrainer.evaluation", "after"),
    "in the middle of a line of the journal": ("os", "write", "half"),
    "after a line of the journal": ("ksuit_runner.record.journal", "Journal.append", "after"),
    "taking a snapshot": ("ksuit_runner.checkpoint.host_buffers", "HostBuffers.copy", "after"),
    "writing a file of a checkpoint": ("ksuit_runner.checkpoint.format", "write_file", "after"),
    "writing the manifest": ("ksuit_runner.checkpoint.format", "write_manifest", "after"),
    "before the hand-over": ("pathlib", "Path.rename", "before"),
    "before the commit": ("ksuit_runner.checkpoint.commit", "Committer.commit", "before"),
    "before files are synced": ("ksuit_runner.checkpoint.commit", "Committer._replace", "before"),
    "between commit and read-back": ("ksuit_runner.checkpoint.commit", "_read_back", "before"),
    "between commit and latest": ("ksuit_runner.checkpoint.commit", "write_text", "before"),
    "between tags and latest": ("ksuit_runner.checkpoint.commit", "write_text", "after"),
    "while latest is replaced": ("pathlib", "Path.replace", "before"),
    "before old checkpoints are removed": ("ksuit_runner.checkpoint.commit", "Committer._prune", "before"),
    "removing an old checkpoint": ("shutil", "rmtree", "before"),
    "before metrics are sent": ("ksuit_runner.tracker.mlflow", "MlflowTracker.log_points", "before"),
    "after metrics were sent": ("ksuit_runner.tracker.mlflow", "MlflowTracker.log_points", "after"),
    "after training": ("ksuit_runner.engine.loop", "finish_training", "after"),
    "before the record is closed": ("ksuit_runner.engine.run_record", "RunRecord.close", "before"),
    "before the status is set": ("ksuit_runner.tracker.mlflow", "MlflowTracker.end_run", "before"),
    "after the status was set": ("ksuit_runner.tracker.mlflow", "MlflowTracker.end_run", "after"),
}


def kill_at(point: str, count: int, number: int = signal.SIGKILL) -> None:
    """Send this process, and none of its workers, a signal when a point is reached for the n-th time.

    The number also decides how checkpoints are written, whatever the speed of the disk: at once, in the background one
    by one as those of large models are, or in the background with a queue.
    """
    checkpoint: Any = importlib.import_module("ksuit_runner.checkpoint.writer")
    if count % 3 == 1:
        checkpoint._QUICK_S = math.inf
    else:
        checkpoint.TINY = 0
    if count % 3 == 2:
        checkpoint._SMALL = 0
    module, name, when = POINTS[point]
    *path, attribute = name.split(".")
    owner = reduce(getattr, path, importlib.import_module(module))
    setattr(owner, attribute, _killing(getattr(owner, attribute), when, count, os.getpid(), number))


def _killing(function: Callable[..., Any], when: str, count: int, pid: int, number: int) -> Callable[..., Any]:
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
            os.kill(pid, number)
        result = function(*args, **kwargs)
        if len(calls) == count and when == "after":
            os.kill(pid, number)
        return result

    return call
