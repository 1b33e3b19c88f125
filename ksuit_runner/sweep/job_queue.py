"""Submits jobs to a launcher, as many at a time as it runs, and reports how each ends."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

from ksuit_runner.errors import KsuitError, LostRankError
from ksuit_runner.launchers.base import Handle, Launcher
from ksuit_runner.sweep.run_job import JobResult, JobTask, run_job
from ksuit_runner.system.signals import TIME_IS_UP, Interruption
from ksuit_runner.tracker.base import EndStatus

_POLL_S = 0.02


def run_jobs(
    tasks: Iterator[JobTask],
    launcher: Launcher,
    interruption: Interruption,
    on_start: Callable[[JobTask], None],
    on_end: Callable[[JobTask, JobResult], None],
    on_restart: Callable[[JobTask, str], None],
    fail_fast: bool = False,
) -> None:
    """Run all jobs. After a signal, or a failure with ``fail_fast``, running ones are asked to end and no more start.

    A job that ends because its own time is up does not end the others. A job of several ranks that has lost one of them
    starts again and resumes its run, at most as often as its config says.

    Args:
        tasks: The jobs; the next one is taken when there is room for it, so it may depend on how others ended.
        launcher: Where they run.
        interruption: A signal that asks the sweep to end.
        on_start: Called before a job starts.
        on_end: Called when a job has ended, with how.
        on_restart: Called before a job of several ranks, one of which was lost, starts again, with what has happened.
        fail_fast: Whether the first failure ends the sweep.
    """
    running: dict[int, tuple[Handle, JobTask]] = {}
    restarts: Counter[int] = Counter()
    waiting: JobTask | None = None
    is_ending = is_stopped = False
    while True:
        while not (is_ending or interruption.signal) and len(running) < launcher.max_jobs:
            task = waiting or next(tasks, None)
            if task is None:
                break
            if running and launcher.devices and not _have_devices([task, *(other for _, other in running.values())]):
                waiting = task
                break
            waiting = None
            on_start(task)
            running[task.index] = launcher.submit(run_job, task), task
        ended = [index for index, (handle, _) in running.items() if handle.done()]
        for index in ended:
            handle, task = running.pop(index)
            result = _job_result(handle, task)
            is_asked_to_end = is_ending or interruption.signal is not None
            if result.is_lost and restarts[index] < task.max_restarts and not is_asked_to_end:
                restarts[index] += 1
                on_restart(
                    task,
                    f"{result.error}: all ranks start again ({restarts[index]} of at most {task.max_restarts} times)",
                )
                running[index] = launcher.submit(run_job, task), task
                continue
            on_end(task, result)
            is_ending |= result.signal not in (None, TIME_IS_UP) or (fail_fast and result.status == EndStatus.FAILED)
        is_ending |= interruption.signal is not None
        if is_ending and running and not is_stopped:
            launcher.stop([handle for handle, _ in running.values()])
            is_stopped = True
        if not running and (is_ending or not ended):
            return
        if running and not ended:
            time.sleep(_POLL_S)


def _have_devices(tasks: Sequence[JobTask]) -> bool:
    """Whether there are as many GPUs as the ranks of these jobs need."""
    return sum(task.ranks for task in tasks) <= len(tasks[0].devices)


def _job_result(handle: Handle, task: JobTask) -> JobResult:
    """Return how a job ended, also if its process died."""
    try:
        result: Any = handle.result()
    except CancelledError:
        return JobResult(task.index, EndStatus.KILLED, task.run_id)
    except KsuitError as error:
        is_lost = isinstance(error, LostRankError) and task.ranks > 1
        return JobResult(task.index, EndStatus.FAILED, task.run_id, error=str(error), is_lost=is_lost)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return JobResult(task.index, EndStatus.FAILED, task.run_id, error=f"the process of this job died: {reason}")
    assert isinstance(result, JobResult)
    return result
