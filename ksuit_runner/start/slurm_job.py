"""Puts the job of Slurm back into its queue, once its run has ended because the job's time is up."""

import os
import subprocess
from collections.abc import Mapping

from ksuit_runner.distributed.environment import place
from ksuit_runner.system.signals import REQUEUE_SIGNALS
from ksuit_runner.ui.terminal import make_console, print_warning

_TIMEOUT_S = 60.0


def job_in(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the id of the Slurm job that this process is part of, such as ``123`` or ``123_4`` of an array."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")


def requeue_after(signal: int | None, is_wanted: bool) -> None:
    """Have Slurm start its job again, if a signal that announces the end of the job's time has ended the run.

    The job then repeats its command, which resumes the run, see ``BegunRuns``. Slurm ends what is left of the job: this
    is the last thing to be done. Of several ranks, rank 0 does it.

    Args:
        signal: The signal that has ended the run, if one has.
        is_wanted: Whether the config asks for it.
    """
    job, here = job_in(), place()
    if not is_wanted or job is None or signal not in REQUEUE_SIGNALS or (here is not None and here.rank > 0):
        return
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        reason = (done.stderr or done.stdout).strip() if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if reason is None:
        make_console().print(f"requeue  job {job} waits in the queue again, and resumes the run")
    else:
        print_warning(make_console(stderr=True), f"job {job} could not be put back into the queue: {reason}")
