"""The log writer, through which all metrics of a run go."""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, KsuitError
from ksuit_runner.metric_property import MetricPropertyProvider, Summary
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.point import Point

_Pending = tuple[float | Tensor, str]
"""A value and the callback that logged it; a named tuple costs four times as much to make, which is a tenth of what a
metric costs."""

_WRITTEN = -1  # number of the round, in a stored log, of what was written before the rounds began


class LogWriter:
    """Collects the metrics of an update and writes them to the journal, from where they are sent to the tracker.

    There is one per run, handed to every callback. The step of a point is the update: the one that is being computed
    before the optimizer's step, the one that was computed after it. A tensor stays on its device until the flush,
    which moves all of them at once. Threads may log too.

    What callbacks log in reaction to a flush belongs to the same update; each flush of an update is a round.

    Args:
        journal: Journal of the run.
        update_counter: Position of the run.
        metric_property_provider: Knows which direction of a metric is better.
        check_key: Raises an error for a key that the tracker would refuse.
        is_logged: Returns whether a point is recorded already: of updates that are computed again after a resume.
        prefix: Prefix of every key: ``evaluate=`` records its metrics beside those of training.

    Attributes:
        source: Name of the callback that is logging.
        is_ahead: Whether an update is being computed that is not counted yet.
        summary: Last and best value of every metric so far.
    """

    def __init__(
        self,
        journal: Journal,
        update_counter: UpdateCounter,
        metric_property_provider: MetricPropertyProvider,
        check_key: Callable[[str], None],
        is_logged: Callable[[str, int], bool],
        prefix: str = "",
    ) -> None:
        self.source = ""
        self.prefix = prefix
        self.is_ahead = False
        self.summary: dict[str, Summary] = {}
        self._journal = journal
        self._counter = update_counter
        self._properties = metric_property_provider
        self._check_key = check_key
        self._is_logged = is_logged
        self._lock = Lock()
        self._pending: dict[str, _Pending] = {}
        self._to_come: list[dict[str, _Pending]] = []  # what was logged in later rounds before a resume
        self._rounds: list[Mapping[str, float]] = []
        self._written: Mapping[str, _Pending] = {}
        self._written_values: Mapping[str, float] = {}
        self._written_step = -1

    def add_scalar(
        self,
        key: str,
        value: float | Tensor,
        logger: logging.Logger | None = None,
        format_str: str | None = None,
    ) -> None:
        """Log a metric at the current update. The same value logged once more is the same point.

        Args:
            key: Name of the metric, parts separated by ``/``.
            value: A number, or a tensor with one element on any device. Its present value is logged; it is read at the
                flush.
            logger: Also log the metric as a line of this logger, at once, which waits for a tensor's device.
            format_str: Format of the number in that line, such as ``.2f``.

        Raises:
            KsuitError: Another value was logged under this key at this update; both callbacks are named. Or the value
                is not a number.
            ConfigError: The tracker does not take such a key; the callback is named.
        """
        key = self.prefix + key
        if type(value) is not float:
            value = self._snapshot(key, value)
        if logger is not None:
            value = _to_number(value)
            logger.info("%s: %s", key, format(value, format_str or ".4g"))
        with self._lock:
            if key in self._pending or (
                key in self._written and self._written_step == self._counter.update + self.is_ahead
            ):
                self._check_same(key, value, self.source)
                return
            if key not in self.summary:
                self._check(key)
            self._pending[key] = (value, self.source)

    def _snapshot(self, key: str, value: Any) -> float | Tensor:
        """Return a value that does not change if the callback changes its tensor or array."""
        if isinstance(value, Tensor):
            if value.numel() == 1 and not value.is_complex():
                return value.detach().clone()
            found = f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
        else:
            found = f"{type(value).__name__} {value!r:.50}"
            if not isinstance(value, str | bytes):
                try:
                    return float(value)
                except (TypeError, ValueError, OverflowError):
                    pass
        raise KsuitError(f"'{key}' has to be a number, not {found}", path=f"callbacks.{self.source}")

    def _check(self, key: str) -> None:
        try:
            self._check_key(key)
        except ConfigError as error:
            error.locate(f"callbacks.{self.source}")
            raise

    def _check_same(self, key: str, value: float | Tensor, source: str) -> None:
        """Check that a value is the one that was logged before at this update; this waits for a tensor's device."""
        if key in self._pending:
            before, earlier = self._pending[key]
        else:
            before, earlier = self._written_values[key], self._written[key][1]
        old, new = _to_number(before), _to_number(value)
        if old != new and not (math.isnan(old) and math.isnan(new)):
            raise KsuitError(
                f"'{key}' is logged twice at update {self._counter.update + self.is_ahead}, "
                f"as {new!r}, and before by callbacks.{earlier} as {old!r}",
                path=f"callbacks.{source}",
            )

    def start_rounds(self) -> None:
        """Start with the first round of an update."""
        self._rounds.clear()

    def flush(self) -> dict[str, float]:
        """Write what was logged at this update to the journal and return it, by the keys that callbacks use."""
        if not self._pending:
            return {}
        with self._lock:
            pending, self._pending = self._pending, self._to_come.pop(0) if self._to_come else {}
        metrics = _to_numbers(pending)
        step = self._counter.update
        is_more = self._written_step == step
        self._written = {**self._written, **pending} if is_more else pending
        self._written_values = {**self._written_values, **metrics} if is_more else metrics
        self._written_step = step
        self._rounds.append(metrics)
        is_logged = self._is_logged
        self._journal.append(step, {key: value for key, value in metrics.items() if not is_logged(key, step)})
        self._summarize(metrics, step)
        if not self.prefix:
            return metrics
        return {key.removeprefix(self.prefix): value for key, value in metrics.items()}

    def mark(self) -> int:
        """Return a mark for ``discard``: the number of metrics that wait for the flush."""
        return len(self._pending)

    def discard(self, mark: int = 0) -> None:
        """Discard what was logged since the mark, by default since the last flush, because it will be logged again."""
        for key in list(self._pending)[mark:]:
            del self._pending[key]

    def discard_of(self, sources: Collection[str]) -> None:
        """Discard what these callbacks have logged since the last flush, because it was recorded before a resume."""
        self._pending = {key: item for key, item in self._pending.items() if item[1] not in sources}

    def abandon_update(self) -> None:
        """Discard what was logged for an update that failed."""
        self.discard()
        self.is_ahead = False

    def state_dict(self) -> dict[str, Any]:
        """Return what was logged at this update, written or not, for a run that ends between two of its hooks.

        It maps each key to the value, the name of the callback, and the number of the round.
        """
        rounds = {key: number for number, metrics in enumerate(self._rounds) for key in metrics}
        rounds |= dict.fromkeys(self._pending, len(self._rounds))
        is_written = self._written_step == self._counter.update
        values = {**(self._written_values if is_written else {}), **_to_numbers(self._pending)}
        found = {**self._written, **self._pending}
        return {key: [value, found[key][1], rounds.get(key, _WRITTEN)] for key, value in values.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what was logged at this update; what was written is not written again."""
        written, rounds = {}, dict[int, dict[str, _Pending]]()
        is_written = self._written_step == self._counter.update
        for key, (value, source, *number) in state_dict.items():
            if is_written and key in self._written:  # by a callback that is new, before training
                self._check_same(key, value, source)
            elif number == [_WRITTEN]:
                written[key] = (float(value), source)
            else:
                rounds.setdefault(number[0] if number else 0, {})[key] = (float(value), source)
        values = {key: value for key, (value, _) in written.items()}
        self._written = {**(self._written if is_written else {}), **written}
        self._written_values = {**(self._written_values if is_written else {}), **values}
        self._written_step = self._counter.update
        self._pending, *self._to_come = [rounds.get(number, {}) for number in range(max(rounds, default=0) + 1)]

    def write_rest(self) -> None:
        """Write what a full disk did not take, without waiting for the disk.

        Raises:
            OSError: It is still full.
        """
        self._journal.write_rest()

    def summarize(self, points: Iterable[Point]) -> None:
        """Add points that were recorded before to the summary.

        It is rebuilt from the record and not stored in checkpoints, which are the same in every run; speeds are not.
        """
        for point in points:
            self._summarize({point.key: point.value}, point.step)

    def _summarize(self, metrics: Mapping[str, float], step: int) -> None:
        summaries = self.summary
        for key, value in metrics.items():
            summary = summaries.get(key)
            if summary is None:
                summary = summaries[key] = Summary(self._properties.direction(key), value, step)
            summary.add(value, step)


def _to_number(value: float | Tensor) -> float:
    return float(value) if isinstance(value, Tensor) else value


def _to_numbers(pending: Mapping[str, _Pending]) -> dict[str, float]:
    """Read all values, those on a device in one transfer each for the device."""
    numbers: dict[str, float] = {}
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for key, item in pending.items():
        value = item[0]
        if isinstance(value, float):
            numbers[key] = value
        else:
            numbers[key] = math.nan  # reserves its position in the order
            by_device.setdefault(value.device, {})[key] = value.reshape(())
    for device, tensors in by_device.items():
        dtype = torch.float32 if device.type == "mps" else torch.float64
        stacked = torch.stack([tensor.to(dtype) for tensor in tensors.values()])
        numbers.update(zip(tensors, stacked.tolist(), strict=True))
    return numbers
