"""The lines that a sweep prints while it runs: a few at its start, and one or more per job."""

import os

from rich.console import Console
from rich.text import Text

from ksuit_runner.paths import PathProvider, SweepPaths
from ksuit_runner.security.masking import mask_text
from ksuit_runner.sweep.job_config import overrides_of
from ksuit_runner.sweep.leaderboard_tables import format_seconds
from ksuit_runner.sweep.plan import Job, SweepPlan
from ksuit_runner.sweep.run_job import JobResult
from ksuit_runner.ui.command_line import resume_command
from ksuit_runner.ui.terminal import print_pairs


def print_sweep(console: Console, plan: SweepPlan, paths: SweepPaths, total: int, where: str, tracked: str) -> None:
    """Print which sweep starts, how many jobs it has, where they run, and how to resume it."""
    pairs = {
        "sweep": plan.name,
        "id": paths.sweep_id,
        "jobs": f"{total}, {where}",
        "tracked": tracked,
        "resume": resume_command(paths.sweep_id, paths.output_dir),
    }
    print_pairs(console, pairs)


def print_job(console: Console, job: Job, total: int, what: str, seconds: float = 0.0) -> None:
    """Print that a job starts, or how it ended."""
    head = f"job {job.index + 1}/{total}"
    words = [head, what, format_seconds(seconds), mask_text(" ".join(overrides_of(job.combination)))]
    console.print(Text("  ".join(word for word in words if word), "bold"), soft_wrap=True)


def print_failure(console: Console, job: Job, result: JobResult, paths: SweepPaths, has_trace: bool) -> None:
    """Print why a job failed: the error, where its log is, and the traceback.

    Args:
        console: Where to print.
        job: The job.
        result: How it ended.
        paths: Files of the sweep.
        has_trace: Whether to print the traceback, which a run in this process has printed itself.
    """
    console.print(Text.assemble(("error:", "bold red"), f" job {job.index + 1} failed: {result.error}"), soft_wrap=True)
    if result.run_id is not None:
        log = PathProvider(paths.output_dir, result.run_id).log
        console.print(Text(f"log: {os.path.relpath(log)}"), soft_wrap=True)
    if result.trace and (has_trace or result.run_id is None):
        console.print(Text(result.trace.rstrip()), soft_wrap=True)
