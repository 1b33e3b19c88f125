"""One tracker in the recorder, and the run that it records."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec

from ksuit_runner.config.factory import Factory
from ksuit_runner.config.targets import Trust
from ksuit_runner.paths import OutputPaths
from ksuit_runner.recorder.protocol import unpack
from ksuit_runner.tracker.base import BaseTracker
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


class Description(msgspec.Struct, frozen=True):
    """What the training process has to know of a tracker; the attributes are those of ``BaseTracker``."""

    require: bool
    close_timeout_s: float


class Session:
    """Serves the requests about one tracker, in their order, in a thread of its own.

    Args:
        opening: What to build it from.
    """

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._tracker: BaseTracker | None = None
        self._lost_run = opening.run_id
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder-session")

    def submit(self, method: str, arguments: Mapping[str, Any]) -> Future[Any]:
        """Have a method called in the session's thread."""
        return self._thread.submit(self._call, method, arguments)

    def close(self) -> None:
        """Take no more requests."""
        self._thread.shutdown(wait=False)

    def describe(self) -> Description:
        """Return the settings of the tracker."""
        return Description(self._built.require, self._built.close_timeout_s)

    def warm_up(self) -> None:
        """Import what the tracker's first call needs."""
        self._built.warm_up()

    @property
    def _built(self) -> BaseTracker:
        if self._tracker is None:
            factory = Factory({"tracker": self._opening.tracker}, self._opening.trust)
            self._tracker = build_tracker(factory, OutputPaths(self._opening.output_dir))
        return self._tracker

    def _call(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """Call a method of the session or of the tracker, or return a property of it."""
        if method in _OWN:
            return _OWN[method](self, **arguments)
        if self._lost_run is not None:
            self._built.attach_run(self._lost_run)
            self._lost_run = None
        found = getattr(BaseTracker, method)
        if isinstance(found, property):
            return getattr(self._built, method)
        return getattr(self._built, method)(**unpack(found, arguments))


_OWN: dict[str, Callable[..., Any]] = {method.__name__: method for method in (Session.describe, Session.warm_up)}
