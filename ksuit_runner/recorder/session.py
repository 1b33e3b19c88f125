"""One tracker in the recorder, and the run that it records."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from inspect import signature
from typing import Any

import msgspec

from ksuit_runner.checkpoint.commit import OnCheckpoint
from ksuit_runner.config.factory import Factory
from ksuit_runner.config.targets import Trust, targets_in
from ksuit_runner.errors import ConfigError, TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.recorder.protocol import unpack
from ksuit_runner.recorder.recorded_run import RecordedRun
from ksuit_runner.system.imports import quick_imports
from ksuit_runner.tracker.base import BaseTracker, EndStatus
from ksuit_runner.tracker.build import build_tracker


class Opening(msgspec.Struct, frozen=True):
    """What a session is opened with.

    Attributes:
        tracker: Config of the tracker, as plain values.
        output_dir: The output folder.
        trust: Limits of a config that was not composed here.
        run_id: Run that the tracker was bound to in a recorder that has died.
    """

    tracker: dict[str, Any]
    output_dir: str
    trust: Trust | None = None
    run_id: str | None = None

    @property
    def is_shipped(self) -> bool:
        """Whether no part of the tracker is the user's."""
        try:
            targets = [str(target) for _, target in targets_in("tracker", self.tracker)]
        except ConfigError:  # reported when the tracker is built
            return False
        return all(target.startswith("ksuit_runner.") for target in targets)


class Description(msgspec.Struct, frozen=True):
    """What the training process has to know of a tracker; the attributes are those of ``BaseTracker``."""

    require: bool
    close_timeout_s: float
    has_registry: bool = False
    may_be_away: bool = False


_OF_SESSION = ("describe", "warm_up", "record", "close_run")
_OF_RUN = ("forget_lost", "reach", "start", "notify", "hurry", "finish", "restore_tags")


class Session:
    """Serves the requests about one tracker, in their order, in a thread of its own.

    Args:
        opening: What to build it from.
        on_checkpoint: See ``Recording``.
    """

    def __init__(self, opening: Opening, on_checkpoint: OnCheckpoint) -> None:
        self._opening = opening
        self._on_checkpoint = on_checkpoint
        self._run: RecordedRun | None = None
        self._has_new_run = False
        self._tracker: BaseTracker | None = None
        self._lost_run = opening.run_id
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder-session")

    def submit(self, method: str, arguments: Mapping[str, Any]) -> Future[Any]:
        """Have a method called in the session's thread."""
        return self._thread.submit(self._call, method, arguments)

    def close(self) -> None:
        """Take no more requests."""
        self._thread.shutdown(wait=False)

    def drain(self, timeout_s: float) -> None:
        """Wait until the requests are done that were taken, for a bounded time."""
        with suppress(TimeoutError, RuntimeError):  # the interpreter of a recorder in place may be shutting down
            self._thread.submit(lambda: None).result(timeout_s)

    @property
    def records_run(self) -> bool:
        """Whether there is a run that has not ended."""
        return self._run is not None or self._has_new_run

    def end_dead(self, reason: str | None) -> None:
        """Record the end of a run whose process has died, for whatever reason if that is not known."""
        if self._run is not None:
            self._run.end_dead(reason)
        elif self._has_new_run:  # it died before it could write anything of the run that it had begun
            with suppress(TrackerError):
                self._built.end_run(EndStatus.KILLED)

    def _describe(self) -> Description:
        return msgspec.convert(self._built, Description, from_attributes=True)

    def _warm_up(self) -> None:
        with quick_imports(before_runs=not self.records_run):
            self._built.warm_up()

    def _record(self, run_id: str, token: str) -> None:
        """Begin to record a run of the output folder, whose lock the training process holds; asked twice, only once."""
        if self._run is None:
            paths = PathProvider(self._opening.output_dir, run_id)
            self._run = RecordedRun(self._built, paths, token, self._on_checkpoint)

    def _close_run(self) -> None:
        if self._run is not None:
            self._run.close()
        self._run, self._has_new_run = None, False

    @property
    def _built(self) -> BaseTracker:
        if self._tracker is None:
            factory = Factory({"tracker": self._opening.tracker}, self._opening.trust)
            self._tracker = build_tracker(factory, OutputPaths(self._opening.output_dir))
        return self._tracker

    def _call(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """Call a method of the session, of its run or of its tracker, or return a property of that."""
        if method in _OF_SESSION:
            return getattr(self, f"_{method}")(**arguments)
        if method in _OF_RUN:
            if self._run is None:
                raise TrackerError("the recorder could not be started again for this run")
            return getattr(self._run, method)(**arguments)
        if self._lost_run is not None:
            self._built.attach_run(self._lost_run)
            self._lost_run = None
        found = getattr(BaseTracker, method)
        if isinstance(found, property):
            return getattr(self._built, method)
        # By position, as everywhere: a user's tracker may name its arguments otherwise.
        call = signature(found).bind(None, **unpack(found, arguments))
        call.apply_defaults()
        result = getattr(self._built, method)(*call.args[1:])
        if method in ("start_run", "end_run"):
            self._has_new_run = method == "start_run"
        return result
