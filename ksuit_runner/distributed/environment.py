"""What has started this process as one of several ranks, as the environment tells: torchrun, Slurm or ``ranks=``."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from zlib import crc32

from ksuit_runner.system.signals import SIGNALS

_FIRST_HOST = re.compile(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^\[,]*))?")
_FIRST_PORT, _PORTS = 20_000, 10_000

STARTER = "KSUIT_STARTER"
"""Variable with the name of what has started the ranks, for messages."""

STORE_SOCKET = "KSUIT_STORE_SOCKET"
"""Variable with the file descriptor of a socket at which rank 0 can listen: nobody else takes its port meanwhile."""

ATTEMPT = "KSUIT_ATTEMPT"
"""Variable that has the same value in all ranks of a job, and another one whenever the job is started again."""


@dataclass(frozen=True)
class Place:
    """The place of this process among the ranks of a run.

    Attributes:
        starter: What has started it, for messages.
        rank: Its number, from 0.
        size: How many ranks there are.
        local_size: How many of them are on this machine; None if nothing tells.
    """

    starter: str
    rank: int
    size: int
    local_size: int | None


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place of this process among the ranks; None if it was started alone.

    Args:
        environment: Variables of the environment.
    """
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    starter = environment.get(STARTER) or ("torchrun" if "TORCHELASTIC_RUN_ID" in environment else "WORLD_SIZE")
    local_size = environment.get("LOCAL_WORLD_SIZE", "")
    return Place(starter, rank, size, int(local_size) if local_size.isdecimal() else None)


def for_starter(status: int) -> int:
    """Return the exit status of this process for what has started it.

    torchrun takes every status but 0 for a failure, and starts the ranks again: also those that have ended with a
    checkpoint because a signal has asked them to.

    Args:
        status: The true one.
    """
    is_repeated = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return 0 if is_repeated and status - 128 in SIGNALS else status


def adopt_tasks(rank: int, size: int, local_rank: int, nodes: int, host: str, attempt: str) -> None:
    """Make this process, one of several tasks of a job that all do the same, a rank.

    Args:
        rank: Number of the task.
        size: How many there are, the same number on each machine.
        local_rank: Number of the task among those of its machine.
        nodes: Number of machines.
        host: Machine of the first task.
        attempt: Id of the job and of its start.
    """
    os.environ.update(
        {
            STARTER: "the job",
            ATTEMPT: attempt,
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size // nodes),
            "MASTER_ADDR": os.environ.get("MASTER_ADDR", host),
            "MASTER_PORT": os.environ.get("MASTER_PORT", str(_FIRST_PORT + crc32(attempt.encode()) % _PORTS)),
        }
    )


def adopt_slurm() -> None:
    """Set the variables of torchrun from those of Slurm, in a process that is one of several tasks of ``srun``.

    A batch script itself, and what it starts without ``srun``, is no such task.
    """
    found = from_slurm(os.environ) if "RANK" not in os.environ else None
    os.environ.update(found or {})


def from_slurm(slurm: Mapping[str, str]) -> dict[str, str] | None:
    """Return the variables of torchrun for a task of ``srun``; None if this process is not one of several.

    Rank 0 is on the first machine of the step. All tasks of a step derive the same port from its id; MASTER_ADDR and
    MASTER_PORT count where they are set.

    Args:
        slurm: The variables of the environment.
    """
    try:
        size, rank, local_rank = (int(slurm[f"SLURM_{name}"]) for name in ("STEP_NUM_TASKS", "PROCID", "LOCALID"))
        step = int(slurm["SLURM_JOB_ID"]) + int(slurm.get("SLURM_STEP_ID", 0))
    except (KeyError, ValueError):
        return None
    host = _FIRST_HOST.match(slurm.get("SLURM_STEP_NODELIST", ""))
    if size < 2 or host is None:
        return None
    # Tasks on each machine, in order: 8(x2),4
    each = re.match(r"\d+", slurm.get("SLURM_STEP_TASKS_PER_NODE", ""))
    only_machine = slurm.get("SLURM_STEP_NUM_NODES") == "1"
    return {
        STARTER: "srun",
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size) if only_machine else each[0] if each else "",
        "MASTER_ADDR": slurm.get("MASTER_ADDR") or "".join(part or "" for part in host.groups()),
        "MASTER_PORT": slurm.get("MASTER_PORT") or str(_FIRST_PORT + step % _PORTS),
    }
