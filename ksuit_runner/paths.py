"""The paths of all files in the output folder; no other module composes any."""

import os
import re
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from ksuit_runner.counter import Progress
from ksuit_runner.errors import ResumeError, StorageError

_RUN_ID = r"\A[A-Za-z0-9_-]{1,100}\Z"
RunId = Annotated[str, Meta(pattern=_RUN_ID)]
"""Id of a run, as it is read from a file."""


def is_run_id(text: str) -> bool:
    """Whether a text can be the id of a run, and so the name of its folder but not a path."""
    return re.match(_RUN_ID, text) is not None


def shown_path(path: Path) -> str:
    """Return a path as messages show it: from the working directory on, if it is below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


class OutputPaths:
    """The files that all runs of an output folder share.

    Args:
        output_dir: The folder, by default ``outputs``.
    """

    def __init__(self, output_dir: str | Path) -> None:
        folder = Path(os.path.expanduser(output_dir)).absolute()  # no shell expands `output_dir=~/runs`
        # Links stay in its name, but `..` does not: what it means depends on them.
        self.output_dir = folder.resolve() if ".." in folder.parts else folder
        self.database = self.output_dir / "mlflow.db"
        self.database_lock = self.output_dir / "mlflow.db.lock"
        self.runs_dir = self.output_dir / "runs"
        self.index = self.output_dir / "runs.jsonl"
        self.begun_dir = self.output_dir / ".begun"
        self.fetching_dir = self.output_dir / ".fetching"
        self.sweeps_dir = self.output_dir / "sweeps"

    def check(self) -> None:
        """Check that files can be written there, as far as that shows before the folder is made.

        Raises:
            StorageError: It, or what it is to be made in, is a file or may not be written to.
        """
        there = next(path for path in (self.output_dir, *self.output_dir.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            problem = "you may not write there" if there.is_dir() else "it is a file, and not a folder"
            raise StorageError(f"{there}: {problem}", path="output_dir")


class PathProvider(OutputPaths):
    """The files of one run, and of one of its checkpoints where one is named.

    ``artifacts_dir`` is the artifact root of the run in MLflow's embedded store: MLflow's web page shows its files
    without a copy.

    Args:
        output_dir: The output folder, shared by all runs.
        run_id: Id of the run.
        checkpoint: Name of one of its checkpoints, such as ``E2_U90_S2880``.

    Raises:
        ResumeError: The id is not one; it may come from a server.
    """

    def __init__(self, output_dir: str | Path, run_id: str, checkpoint: str | None = None) -> None:
        super().__init__(output_dir)
        if not is_run_id(run_id):
            raise ResumeError(f"{run_id[:50]!r} is not a run id, which has up to 100 letters, digits, '-' and '_'")
        assert checkpoint is None or Progress.parse(checkpoint), checkpoint
        self.run_id = run_id
        self.run_dir = self.runs_dir / run_id
        self.lock = self.run_dir / "lock.json"
        self.recorder_lock = self.run_dir / "recorder.lock"
        self.journal = self.run_dir / "metrics.jsonl"
        self.journal_sent = self.run_dir / "metrics.sent"
        self.outbox = self.run_dir / "tracker.json"
        self.delivered = self.run_dir / "delivered.json"
        self.uploaded = self.run_dir / "uploaded.json"
        self.length = self.run_dir / "length"
        self.log = self.run_dir / "run.log"
        self.tensorboard_dir = self.run_dir / "tensorboard"
        self.wandb_dir = self.run_dir / "wandb"
        self.artifacts_dir = self.run_dir / "artifacts"
        self.config = self.artifacts_dir / "config.yaml"
        self.launch = self.artifacts_dir / "launch.json"
        self.shapes = self.artifacts_dir / "shapes.json"
        self.signature = self.artifacts_dir / "signature"
        self.environment = self.artifacts_dir / "environment.json"
        self.diff = self.artifacts_dir / "uncommitted.diff"
        self.checkpoints_dir = self.artifacts_dir / "checkpoints"
        self.latest = self.checkpoints_dir / "latest"
        self.tags = self.checkpoints_dir / "tags.json"
        self._checkpoint = checkpoint

    def backlog(self, tracker: str) -> Path:
        """Return the file with what a tracker beside the first could not take yet."""
        return self.run_dir / f"backlog.{tracker}.jsonl"

    @property
    def output_path(self) -> Path:
        """Folder of the run: where its checkpoints and logs are."""
        return self.run_dir

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of the checkpoint."""
        assert self._checkpoint is not None, "these paths name no checkpoint"
        return self.checkpoints_dir / self._checkpoint

    def at_checkpoint(self, checkpoint: str) -> "PathProvider":
        """Return the same paths for one of the run's checkpoints."""
        return PathProvider(self.output_dir, self.run_id, checkpoint)


class SweepPaths(OutputPaths):
    """The files of one sweep. Its runs have folders of their own, like all runs.

    Args:
        output_dir: The output folder, shared by all runs.
        sweep_id: Id of the sweep: that of its parent run.
    """

    def __init__(self, output_dir: str | Path, sweep_id: str) -> None:
        super().__init__(output_dir)
        assert sweep_id and not set(sweep_id) & set("/\\."), sweep_id
        self.sweep_id = sweep_id
        self.sweep_dir = self.sweeps_dir / sweep_id
        self.lock = self.sweep_dir / "lock.json"
        self.plan = self.sweep_dir / "plan.json"
        self.signature = self.sweep_dir / "signature"
        self.jobs = self.sweep_dir / "jobs.jsonl"
        self.ended = self.sweep_dir / "ended.jsonl"
        self.study = self.sweep_dir / "optuna.db"
        self.table = self.sweep_dir / "leaderboard.md"
        self.csv = self.sweep_dir / "leaderboard.csv"
        self.plot = self.sweep_dir / "leaderboard.png"
        self.submitit_dir = self.sweep_dir / "submitit"

    def begun(self, index: int) -> Path:
        """Return the file that exists once a process has begun a job."""
        return self.sweep_dir / "begun" / str(index)

    def decision(self, index: int, attempt: str) -> Path:
        """Return the file in which the first rank of a job tells the others which run they train, if any."""
        return self.sweep_dir / "begun" / f"{index}.{attempt}"

    def job_lock(self, index: int) -> Path:
        """Return the lock of the process that runs a job."""
        return self.sweep_dir / f"job-{index}.lock"

    def device_lock(self, device: str) -> Path:
        """Return the file that is locked by the process that uses a device."""
        return self.sweep_dir / f"device-{device}.lock"
