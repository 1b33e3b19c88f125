"""Times of the phases of updates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from ksuit_runner.engine.phases import CALLBACK

_ON_DEVICE = ("forward", "backward", "step")
_MOST_UNREAD = 64  # updates; the device has long computed the first of so many


class Stopwatch:
    """Adds up the time of each phase over updates, in seconds; a ``PhaseWatcher``.

    The first update begins with its batch, and any other one where the one before it ends: with its batch, or when the
    times are taken. What a callback does is its own time, without that of others to which it hands a shared pass over a
    dataset.

    Forward pass, backward pass and step of a CUDA device last as long as the device takes for them, by events that are
    read once they have passed; everything else is the time of the process, also where it waits for the device.

    Args:
        device: Device of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self._has_events = device.type == "cuda"
        # Of each phase that has begun: when that was, what was counted by then, and the event on the device.
        self._open: list[tuple[float, float, Any]] = []
        self._counted = 0.0
        self._begun: float | None = None
        self._update = _Update()
        self._unread: list[_Update] = []
        self._forget()

    def begin(self, phase: str) -> None:
        """Note that a phase begins."""
        if phase == "data" and not self._open:
            self._begin_update()
        event = _event() if self._has_events and phase in _ON_DEVICE and not self._open else None
        self._open.append((perf_counter(), self._counted, event))

    def end(self, phase: str) -> None:
        """Note that it ends."""
        begun, before, event = self._open.pop()
        if event is not None:
            self._update.events.append((phase, event, _event()))
        elif not self._open or phase.startswith(CALLBACK):
            seconds = perf_counter() - begun - (self._counted - before)
            self._update.seconds[phase] += seconds
            self._counted += seconds
        self._update.has_stepped |= phase == "step"

    def take(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Return the mean and the longest time of each phase over the updates since this was last called.

        The whole of an update is ``update``, and all callbacks together are ``callbacks``. What follows this call in
        the present update counts for the next one.
        """
        self._end_update()
        while self._unread:
            self._read(self._unread.pop(0))
        means = defaultdict(float, {phase: seconds / self._updates for phase, seconds in self._sums.items()})
        longest = self._longest
        self._forget()
        return means, longest

    def _forget(self) -> None:
        self._updates, self._sums, self._longest = 0, _seconds(), _seconds()

    def _begin_update(self) -> None:
        if self._begun is None:
            self._begun, self._update = perf_counter(), _Update()
        self._end_update()

    def _end_update(self) -> None:
        if self._begun is None or not self._update.has_stepped:  # its batch comes in several steps, or it is not here
            return
        now = perf_counter()
        self._update.seconds["update"], self._begun = now - self._begun, now
        self._unread.append(self._update)
        self._update = _Update()
        if len(self._unread) > _MOST_UNREAD:
            self._read(self._unread.pop(0))

    def _read(self, update: _Update) -> None:
        seconds = update.seconds
        for phase, begun, ended in update.events:
            ended.synchronize()
            seconds[phase] += begun.elapsed_time(ended) / 1e3
        seconds["callbacks"] = sum(time for phase, time in seconds.items() if phase.startswith(CALLBACK))
        self._updates += 1
        for phase, time in seconds.items():
            self._sums[phase] += time
            self._longest[phase] = max(self._longest[phase], time)


def _seconds() -> defaultdict[str, float]:
    return defaultdict(float)


@dataclass
class _Update:
    """The times of an update: of the process by phase, and of the device between two events each."""

    seconds: defaultdict[str, float] = field(default_factory=_seconds)
    events: list[tuple[str, Any, Any]] = field(default_factory=list)
    has_stepped: bool = False


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
