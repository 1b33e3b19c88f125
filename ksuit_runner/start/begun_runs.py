"""Which run a command has begun, so that the same command resumes it when it is repeated."""

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from typing import Any

from ksuit_runner.paths import OutputPaths, is_run_id
from ksuit_runner.security.masking import mask_config
from ksuit_runner.start.slurm_job import job_in
from ksuit_runner.system.atomic_files import make_folder, write_text
from ksuit_runner.system.process_watch import identity
from ksuit_runner.system.untrusted_files import UnsafeFileError, read_text


class BegunRuns:
    """The run that the attempts with this id have begun, in a file of the output folder.

    Args:
        outputs: The output folder.
        id: Something that all attempts have in common, and nothing else has.
        is_repeated: Whether this can be another attempt.
    """

    def __init__(self, outputs: OutputPaths, id: str, is_repeated: bool = True) -> None:
        self.id = id
        self.is_repeated = is_repeated
        self._path = outputs.begun_dir / sha256(id.encode()).hexdigest()[:32]

    @classmethod
    def of_this_process(
        cls, outputs: OutputPaths, config: Mapping[str, Any], environment: Mapping[str, str] = os.environ
    ) -> "BegunRuns | None":
        """Return that of what torchrun or Slurm has started, None for a process that nobody starts again.

        Slurm repeats the script of a job that it has requeued, in which each command has a run of its own.

        torchrun repeats the command. What its attempts have in common is ``--rdzv-id``, which is a promise that the
        same id means the same job. Without that it is the agent; and on several machines, which have an agent each,
        the address of rank 0, which a later job may have as well.
        """
        run_id = environment.get("TORCHELASTIC_RUN_ID")
        if run_id is None:
            job = job_in(environment)
            is_repeated = environment.get("SLURM_RESTART_COUNT", "0") != "0"
            return cls(outputs, f"slurm {job} {_digest(config)}", is_repeated) if job else None
        if run_id != "none":
            return cls(outputs, f"rdzv-id {run_id}")
        if environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE"):
            return cls(outputs, f"agent {socket.gethostname()} {identity(os.getppid())}")
        is_repeated = environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        return cls(outputs, f"rank 0 {environment.get('MASTER_ADDR')} {environment.get('MASTER_PORT')}", is_repeated)

    def find(self, config: Mapping[str, Any]) -> str | None:
        """Return the id of the run; None if there is none, or it has another config."""
        if not self.is_repeated:
            return None
        with suppress(OSError, UnsafeFileError):
            run_id, _, digest = read_text(self._path, self._path.parent).strip().partition(" ")
            if is_run_id(run_id) and digest == _digest(config):
                return run_id
        return None

    def add(self, config: Mapping[str, Any], run_id: str) -> None:
        """Remember the run; what cannot be written is not found, and the next attempt begins a new run."""
        with suppress(OSError):
            make_folder(self._path.parent)
            write_text(self._path, f"{run_id} {_digest(config)}\n")

    def remove(self) -> None:
        """Forget the run: nobody asks for it again."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._path.parent.rmdir()  # if it is empty


def _digest(config: Mapping[str, Any]) -> str:
    return sha256(json.dumps(mask_config(config), sort_keys=True, default=str).encode()).hexdigest()
