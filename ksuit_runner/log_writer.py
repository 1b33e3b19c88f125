"""The one place through which all metrics of a run go."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, KsuitError
from ksuit_runner.journal import Journal, Point
from ksuit_runner.metric_property import Direction, MetricPropertyProvider, improves


@dataclass
class Summary:
    """Last and best value of a metric, each with the update that it was logged at; neutral metrics have no best."""

    direction: Direction
    last: float
    last_step: int
    best: float | None = None
    best_step: int | None = None


_Pending = tuple[float | Tensor, str, logging.Logger | None, str | None]
"""A value, the callback that logged it, and the logger and format of a line with it; a named tuple costs four times as
much to make, which is a tenth of what a metric costs."""


class LogWriter:
    """Collects the metrics of an update and writes them to the journal, from where they are sent to the tracker.

    There is one per run, handed to every callback. The step of a point is the update. A tensor stays on its device
    until the flush, which moves all of them at once.

    Args:
        journal: Journal of the run.
        update_counter: Position of the run.
        metric_property_provider: Knows which direction of a metric is better.
        check_key: Raises an error for a key that the tracker would refuse.
        is_logged: Tells whether a point is recorded already: of updates that are computed again after a resume.

    Attributes:
        source: Name of the callback that is logging.
        prefix: What every key begins with: an evaluation of a stored run has its metrics beside those of training.
        summary: Last and best value of every metric so far.
    """

    def __init__(
        self,
        journal: Journal,
        update_counter: UpdateCounter,
        metric_property_provider: MetricPropertyProvider,
        check_key: Callable[[str], None],
        is_logged: Callable[[str, int], bool],
    ) -> None:
        self.source = self.prefix = ""
        self.summary: dict[str, Summary] = {}
        self._journal = journal
        self._counter = update_counter
        self._properties = metric_property_provider
        self._check_key = check_key
        self._is_logged = is_logged
        self._pending: dict[str, _Pending] = {}
        self._written: Mapping[str, _Pending] = {}
        self._written_step = -1
        self._written_values: Mapping[str, float] = {}

    def add_scalar(
        self,
        key: str,
        value: float | Tensor,
        logger: logging.Logger | None = None,
        format_str: str | None = None,
    ) -> None:
        """Log a metric at the current update.

        Args:
            key: Name of the metric, parts separated by ``/``.
            value: A number, or a tensor with one element on any device; it is read at the flush.
            logger: Also write the metric as a line of this logger.
            format_str: Format of the number in that line, such as ``.2f``.

        Raises:
            KsuitError: The key was logged at this update already; both callbacks are named. Or the tensor has not
                exactly one element.
            ConfigError: The tracker does not take such a key; the callback is named.
        """
        key = self.prefix + key
        if key in self._pending or (key in self._written and self._written_step == self._counter.update):
            raise self._logged_twice(key)
        if key not in self.summary:
            self._check(key)
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise KsuitError(f"callbacks.{self.source}: '{key}' is no number, but of shape {tuple(value.shape)}")
            value = value.detach().clone()  # the callback may go on adding to its tensor before the flush
        self._pending[key] = (value, self.source, logger, format_str)

    def _check(self, key: str) -> None:
        try:
            self._check_key(key)
        except ConfigError as error:
            raise ConfigError(f"callbacks.{self.source}: {error}") from None

    def _logged_twice(self, key: str) -> KsuitError:
        _, earlier, *_ = (self._pending if key in self._pending else self._written)[key]
        return KsuitError(
            f"callbacks.{self.source}: '{key}' is logged twice at update {self._counter.update}, "
            f"before by callbacks.{earlier}"
        )

    def flush(self) -> dict[str, float]:
        """Write what was logged at this update to the journal and return it."""
        if not self._pending:
            return {}
        pending, self._pending = self._pending, {}
        metrics = _to_numbers(pending)
        step = self._counter.update
        is_more = self._written_step == step
        self._written = {**self._written, **pending} if is_more else pending
        self._written_values = {**self._written_values, **metrics} if is_more else metrics
        self._written_step = step
        is_logged = self._is_logged
        self._journal.append(step, {key: value for key, value in metrics.items() if not is_logged(key, step)})
        for key, value in metrics.items():
            self._summarize(key, value, step)
            _, _, logger, format_str = pending[key]
            if logger is not None:
                logger.info("%s: %s", key, format(value, format_str or ".4g"))
        return metrics

    def mark(self) -> int:
        """Return a mark that ``discard`` can go back to: how many metrics wait for the flush."""
        return len(self._pending)

    def discard(self, mark: int = 0) -> None:
        """Forget what was logged since the mark, by default since the last flush, because it will be logged again."""
        for key in list(self._pending)[mark:]:
            del self._pending[key]

    def state_dict(self) -> dict[str, Any]:
        """Return what was logged at this update, written or not, for a run that ends in the middle of its hooks."""
        is_written = self._written_step == self._counter.update
        values = {**(self._written_values if is_written else {}), **_to_numbers(self._pending)}
        found = {**self._written, **self._pending}
        return {key: [value, found[key][1]] for key, value in values.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what was logged at this update before; what of it was written is not written again."""
        self._pending = {key: (value, source, None, None) for key, (value, source) in state_dict.items()}

    def sync(self) -> None:
        """Wait until everything that was flushed is on the disk."""
        self._journal.sync()

    def summarize(self, points: Iterable[Point]) -> None:
        """Take points that were recorded before into the summary.

        It is rebuilt from the record and not kept in checkpoints: speeds differ from run to run, checkpoints do not.
        """
        for point in points:
            self._summarize(point.key, point.value, point.step)

    def _summarize(self, key: str, value: float, step: int) -> None:
        summary = self.summary.get(key)
        if summary is None:
            summary = self.summary[key] = Summary(self._properties.direction(key), value, step)
        summary.last, summary.last_step = value, step
        if summary.direction != "neutral" and improves(summary.direction, value, summary.best):
            summary.best, summary.best_step = value, step


def _to_numbers(pending: Mapping[str, _Pending]) -> dict[str, float]:
    """Read all values, those on a device in one transfer each for the device."""
    numbers: dict[str, float] = {}
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for key, item in pending.items():
        value = item[0]
        if isinstance(value, Tensor):
            numbers[key] = math.nan  # its place in the order
            by_device.setdefault(value.device, {})[key] = value.reshape(())
        else:
            numbers[key] = float(value)
    for device, tensors in by_device.items():
        dtype = torch.float32 if device.type == "mps" else torch.float64
        stacked = torch.stack([tensor.to(dtype) for tensor in tensors.values()])
        numbers.update(zip(tensors, stacked.tolist(), strict=True))
    return numbers
