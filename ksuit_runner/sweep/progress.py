"""What a sweep shows while it runs: one bar for all jobs, those that run, the best value, and a line for each end."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ksuit_runner.metric_property import MetricPropertyProvider, improves
from ksuit_runner.paths import PathProvider, SweepPaths
from ksuit_runner.security.masking import mask_text
from ksuit_runner.sweep.job_config import overrides_of
from ksuit_runner.sweep.job_runs import runs_of_jobs
from ksuit_runner.sweep.job_watch import JobWatch
from ksuit_runner.sweep.plan import Job, SweepPlan
from ksuit_runner.sweep.run_job import JobResult
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.ui.command_line import resume_command
from ksuit_runner.ui.formats import format_duration, format_number
from ksuit_runner.ui.progress_bar import ProgressBar
from ksuit_runner.ui.terminal import print_pairs, tracked_at

_REFRESH_S = 0.5
_MOST_SHOWN = 8


def print_sweep(console: Console, plan: SweepPlan, paths: SweepPaths, total: int, where: str, tracked: str) -> None:
    """Print which sweep starts, how many jobs it has, where they run, and how to resume it."""
    pairs = {
        "sweep": plan.name,
        "id": paths.sweep_id,
        "jobs": f"{total}, {where}",
        "tracked": tracked_at(console, tracked),
        "resume": resume_command(paths.sweep_id, paths.output_dir),
    }
    print_pairs(console, pairs)


class SweepProgress:
    """Shows how far a sweep is, while its jobs print nothing themselves.

    A thread reads what the runs write into their folders. Without a terminal it prints a line at intervals, if there is
    something new. Files are read without the lock: if a disk does not answer, the sweep's main loop goes on.

    Args:
        console: Where it is shown.
        paths: Files of the sweep.
        plan: Its plan.
        properties: Knows which direction of a metric is better.
        total: How many jobs there will be.
        every_n_seconds: Interval of the lines without a terminal.
    """

    def __init__(
        self,
        console: Console,
        paths: SweepPaths,
        plan: SweepPlan,
        properties: MetricPropertyProvider,
        total: int,
        every_n_seconds: float = 30.0,
    ) -> None:
        self._console, self._paths, self._plan, self._properties, self._total = console, paths, plan, properties, total
        self._direction = properties.direction(plan.objective) if plan.objective else "neutral"
        self._bar = ProgressBar(console)
        self._interval = _REFRESH_S if self._bar.is_live else every_n_seconds
        self._running: dict[int, JobWatch] = {}
        self._unread: deque[JobWatch] = deque()  # of jobs that had ended before; the best one is not known until then
        self._ended = 0
        self._best: JobWatch | None = None
        self._index_size = -1
        self._state, self._is_over = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="sweep-progress", daemon=True)

    def __enter__(self) -> SweepProgress:
        self._bar.begin(self._total)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        while self._unread and self._bar.is_live and error is None:
            self._read_ended()
        self._draw()
        self._bar.stop()

    def had_ended(self, job: Job, status: str, run_id: str | None, is_pruned: bool = False) -> None:
        """Count a job that ended before this process was started, and whether a search had pruned it."""
        with self._state:
            self._ended += 1
            self._bar.skip(1)
            if status == EndStatus.FINISHED and not is_pruned and self._direction != "neutral":
                self._unread.append(self._watch(job, run_id))  # it may have much to read, and no job waits for that

    def starts(self, job: Job, run_id: str | None) -> None:
        """Show a job that starts, or resumes its run."""
        watch = self._watch(job, run_id)
        watch.look()
        with self._state:
            self._bar.skip(watch.fraction)
            self._running[job.index] = watch
        self._draw()
        if not self._bar.is_live:
            self.say(job, "starts")

    def ends(self, job: Job, result: JobResult, is_pruned: bool = False) -> None:
        """Print how a job ended, whether a search has pruned it, and why if it failed."""
        watch = self._running[job.index]
        watch.find(self._paths, result.run_id)
        watch.look()
        with self._state:
            del self._running[job.index]
            self._ended += result.status != EndStatus.KILLED  # one that was killed is resumed
            if result.status == EndStatus.FINISHED and not is_pruned:
                self._rank(watch)
        self._draw()
        *_, value = self._cells(watch)
        what = "pruned" if is_pruned else result.status.lower()
        line = self._sentence(job, what, format_duration(result.seconds), value)
        self._print(line, *(self._reasons(job, result) if result.status == EndStatus.FAILED else ()))

    def say(self, job: Job, what: str) -> None:
        """Print a line about a job, with what varies in it."""
        self._print(self._sentence(job, what))

    def acknowledge(self, message: str) -> None:
        """Print that a signal was received."""
        self._print(Text(message, "yellow"))

    def _print(self, *lines: Text) -> None:
        self._console.print(Text("\n").join(lines), soft_wrap=True)  # at once: nothing comes in between

    def _sentence(self, job: Job, *words: str) -> Text:
        line = [f"job {job.index + 1}/{self._total}", *words, _varied(job)]
        return Text("  ".join(filter(None, line)), "bold")

    def _reasons(self, job: Job, result: JobResult) -> Iterator[Text]:
        """Yield the error that a job failed with, where its log is, and the traceback."""
        yield Text.assemble(("error:", "bold red"), f" job {job.index + 1} failed: {result.error}")
        log = None if result.run_id is None else PathProvider(self._paths.output_dir, result.run_id).log
        if log is not None and os.path.isfile(log):  # a job that is refused before its first update leaves none
            yield Text(f"log: {os.path.relpath(log)}")
        if result.trace:
            yield Text(result.trace.rstrip())

    def _watch(self, job: Job, run_id: str | None) -> JobWatch:
        watch = JobWatch(job, self._plan, self._properties)
        watch.find(self._paths, run_id)
        return watch

    def _rank(self, watch: JobWatch) -> None:
        best = None if self._best is None else self._best.value
        if watch.value is not None and self._direction != "neutral" and improves(self._direction, watch.value, best):
            self._best = watch

    def _refresh(self) -> None:
        """Read and show what is new, until the sweep has ended."""
        said: list[str] = []
        while not self._is_over.wait(self._interval):
            self._look()
            with self._state:
                self._draw()
                words = self._words()
            if not self._bar.is_live and words != said:
                said = words
                self._print(Text("  ".join(filter(None, [*words, self._bar.left]))))

    def _look(self) -> None:
        """Read what is new of the jobs that run, and then of those that had ended, for an interval at most."""
        with self._state:
            running = dict(self._running)
        if any(watch.paths is None for watch in running.values()):
            with suppress(OSError):  # of a file system that cannot be reached for now
                size = self._paths.index.stat().st_size if self._paths.index.is_file() else 0
                if size != self._index_size:
                    found, self._index_size = runs_of_jobs(self._paths), size
                    for index, watch in running.items():
                        watch.find(self._paths, found.get(index))
        for watch in running.values():
            watch.look()
        until = monotonic() + self._interval
        while self._unread and monotonic() < until and not self._is_over.is_set():
            self._read_ended()

    def _read_ended(self) -> None:
        watch = self._unread[0]
        watch.look()
        with self._state:
            self._unread.popleft()
            self._rank(watch)

    def _draw(self) -> None:
        with self._state:
            completed = self._ended + sum(watch.fraction for watch in self._running.values())
            self._bar.update(completed, "jobs")
            self._bar.draw(self._table())

    def _table(self) -> Table:
        """Return a row for each job that runs, and one for the best that has ended."""
        table = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None, None):
            table.add_column(ratio=ratio, no_wrap=True, overflow="ellipsis")
        running = list(self._running.values())
        for watch in running[:_MOST_SHOWN]:
            table.add_row(*map(Text, self._cells(watch)))
        if len(running) > _MOST_SHOWN:
            table.add_row("", Text(f"and {len(running) - _MOST_SHOWN} more"))
        if self._best is not None and not self._unread:
            _, varied, _, value = self._cells(self._best)
            table.add_row(*(Text(cell, "green") for cell in ("best", f"{_name(self._best)}  {varied}", "", value)))
        return table

    def _cells(self, watch: JobWatch) -> tuple[str, str, str, str]:
        value = "" if watch.value is None else f"{self._plan.objective} {format_number(watch.value)}"
        return _name(watch), _varied(watch.job), _position(watch), value

    def _words(self) -> list[str]:
        """Return what the bar says, but for the time left."""
        running = [f"{_name(watch)} {_position(watch)}".rstrip() for watch in self._running.values()]
        more = [f"{len(running) - _MOST_SHOWN} more"] if len(running) > _MOST_SHOWN else []
        words = [f"{self._ended} of {self._total} jobs ended", ", ".join([*running[:_MOST_SHOWN], *more])]
        if self._best is not None and not self._unread:
            *_, value = self._cells(self._best)
            words.append(f"best: {_name(self._best)}, {value}")
        return words


def _name(watch: JobWatch) -> str:
    return f"job {watch.job.index + 1}"


def _position(watch: JobWatch) -> str:
    """Return how far a job is: its updates, of how many once that is known."""
    return f"{watch.update}/{watch.length}" if watch.length else ""


def _varied(job: Job) -> str:
    """Return what varies in a job."""
    return mask_text(" ".join(overrides_of(job.combination)))
