"""The tracker of a config as the training process sees it: every call is made by the recorder."""

from __future__ import annotations

import atexit
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec

from ksuit_runner.config.factory import Factory
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.record.point import now
from ksuit_runner.recorder.client import RecorderClient
from ksuit_runner.recorder.protocol import encode, pack, unpack_result
from ksuit_runner.recorder.session import Description, Opening
from ksuit_runner.tracker.base import BaseTracker, RunInfo

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass
class _Known:
    """What is known of a tracker that ships: built from the same config, it answers the same.

    Attributes:
        description: Its description, once it has been built.
        accepted: Names of metrics that it accepts.
    """

    description: Description | None = None
    accepted: set[str] = field(default_factory=set)


_recorders: dict[bool, RecorderClient] = {}
_warm: tuple[Opening, int] | None = None  # what a session was opened with ahead, and its number
_known: defaultdict[bytes, _Known] = defaultdict(_Known)  # by what a session was opened with


def recorder(is_shipped: bool = True) -> RecorderClient:
    """Return the recorder of this process, which is started by its first session.

    Args:
        is_shipped: Whether it is for trackers that ship. Those of the user have another one, if a process has both:
            what the first one imports may be without what these need (``lean_import``).
    """
    global _warm
    if is_shipped not in _recorders or not _recorders[is_shipped].is_own:
        _recorders[is_shipped] = RecorderClient()
        atexit.register(_recorders[is_shipped].shut_down)
        _warm = None
    return _recorders[is_shipped]


def warm_up(factory: Factory, outputs: OutputPaths) -> None:
    """Start the recorder and have it import what a tracker needs, while this process imports torch."""
    global _warm
    opening = _opening(factory, outputs)
    process, session = _session(opening)
    process.warm_up(session)
    _warm = opening, session


def open_tracker(factory: Factory, outputs: OutputPaths) -> BaseTracker:
    """Return the tracker of a config, which is not bound to a run yet. It is built, and does its work, in the recorder.

    Raises:
        ConfigError: It does not fit its config.
        TrackerError: The recorder dies again and again.
    """
    opening = _opening(factory, outputs)
    # The jobs of a sweep have the same tracker, and log the same metrics. One of the user may answer anew each time.
    return RemoteTracker(*_session(opening), known=_known[_key(opening)] if opening.is_shipped else None)


def _session(opening: Opening) -> tuple[RecorderClient, int]:
    """Return a recorder and a session of it: the one that was opened ahead if that fits, else it is closed."""
    global _warm
    process = recorder(opening.is_shipped)
    if not opening.is_shipped and process.is_outdated():  # the user has edited a tracker, or what it imports
        del _recorders[False]
        process.retire()
        process = recorder(is_shipped=False)
    warm, _warm = _warm, None
    if warm is not None:
        ahead, session = warm
        if _key(ahead) == _key(opening):
            return process, session
        recorder(ahead.is_shipped).close(session)
    return process, process.open(opening)


def _opening(factory: Factory, outputs: OutputPaths) -> Opening:
    return Opening(factory.node("tracker"), str(outputs.output_dir), factory.trust)


def _key(opening: Opening) -> bytes:
    return encode(msgspec.to_builtins(opening, enc_hook=str))


def _remote(
    method: Callable[Concatenate[Any, Arguments], Result],
) -> Callable[Concatenate[Any, Arguments], Result]:
    """Return a method that has the recorder call the method of that name."""

    def call(self: Any, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        result: Result = unpack_result(method, self._call(method.__name__, pack(method, args, kwargs)))
        return result

    call.__name__, call.__doc__ = method.__name__, method.__doc__  # not ``wraps``: it would be abstract, too
    return call


def _binding(
    method: Callable[Concatenate[Any, Arguments], RunInfo],
) -> Callable[Concatenate[Any, Arguments], RunInfo]:
    """Return a remote method that binds the tracker to a run."""
    remote = _remote(method)

    def call(self: Any, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> RunInfo:
        info = remote(self, *args, **kwargs)
        self._bound_to(info)
        return info

    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call


class RemoteTracker(BaseTracker):
    """Has every method called in the recorder, by the tracker that a session was opened for; closed when unused.

    Args:
        client: The recorder.
        session: Number of the session.
        known: What is known of such a tracker, to which its answers are added; None asks each time.
    """

    def __init__(self, client: RecorderClient, session: int, known: _Known | None = None) -> None:
        super().__init__()
        self._known = _Known() if known is None else known
        self._is_constant = known is not None
        self.client, self.session = client, session
        weakref.finalize(self, client.abandon, session).atexit = False
        if self._known.description is None:  # else nobody waits until it is built
            self._known.description = msgspec.convert(client.describe(session), Description)
        description = self._known.description
        self.require, self.close_timeout_s = description.require, description.close_timeout_s
        self.has_registry, self.may_be_away = description.has_registry, description.may_be_away

    def _call(self, method: str, arguments: dict[str, Any]) -> Any:
        again = {}
        if method == "start_run":  # with a time, a run that has been created is found by its START_TAG
            again = {"start_time": arguments.get("start_time") or now()}
        return self.client.call(self.session, method, arguments, again)

    def _bound_to(self, info: RunInfo) -> None:
        self._run = info
        self.client.bind(self.session, info.run_id)

    @property
    def artifacts_are_local(self) -> bool:
        """Whether the run's files need no upload."""
        return bool(self._call("artifacts_are_local", {}))

    @property
    def is_behind(self) -> bool:
        """Whether something is not recorded yet, as far as the recorder can say."""
        try:
            return bool(self._call("is_behind", {}))
        except TrackerError:
            return True

    def check_key(self, key: str) -> None:
        """Check the name of a metric or parameter, once for all runs of this process that are recorded alike."""
        if key not in self._known.accepted:
            self._call("check_key", {"key": key})
            if self._is_constant:
                self._known.accepted.add(key)

    check_answer = _remote(BaseTracker.check_answer)
    is_bound_to = _remote(BaseTracker.is_bound_to)
    start_run = _binding(BaseTracker.start_run)
    resume_run = _binding(BaseTracker.resume_run)
    attach_run = _binding(BaseTracker.attach_run)
    end_run = _remote(BaseTracker.end_run)
    log_points = _remote(BaseTracker.log_points)
    log_files = _remote(BaseTracker.log_files)
    deliver = _remote(BaseTracker.deliver)
    deliver_end = _remote(BaseTracker.deliver_end)
    log_params = _remote(BaseTracker.log_params)
    set_tags = _remote(BaseTracker.set_tags)
    log_inputs = _remote(BaseTracker.log_inputs)
    register_model = _remote(BaseTracker.register_model)
    last_steps = _remote(BaseTracker.last_steps)
    history = _remote(BaseTracker.history)
    upload = _remote(BaseTracker.upload)
    download = _remote(BaseTracker.download)
    list_artifacts = _remote(BaseTracker.list_artifacts)
    delete_artifacts = _remote(BaseTracker.delete_artifacts)
    find = _remote(BaseTracker.find)
    children = _remote(BaseTracker.children)
    where = _remote(BaseTracker.where)
