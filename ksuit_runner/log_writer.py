"""The log writer, through which all metrics of a run go, and images, tables and the like."""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, KsuitError, TrackerError
from ksuit_runner.metric_property import MetricPropertyProvider, Summary
from ksuit_runner.record import file_formats
from ksuit_runner.record.file_formats import Contents
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.point import Point
from ksuit_runner.tensors.device import widest_float
from ksuit_runner.trainer.step_writer import SOURCE

_Value = float | Tensor | Contents
_Pending = tuple[_Value, str]
"""A value and the callback that logged it; a named tuple costs four times as much to make, which is a tenth of what a
metric costs. Files are under the path of the first one, and metrics under their keys."""

_WRITTEN = -1  # number of the round, in a stored log, of what was written before the rounds began


class LogWriter:
    """Collects what is logged at an update and writes it to the journal, from where it is sent to the tracker.

    There is one per run, handed to every callback. The step of a point is the update: the one that is being computed
    before the optimizer's step, the one that was computed after it. A tensor stays on its device until the flush,
    which moves all of them at once. Threads may log too.

    Images, figures, histograms, tables, texts and files become files among the run's artifacts at the flush, once for
    an update, however often it is computed. They are encoded at once, which waits for a tensor's device.

    What callbacks log in reaction to a flush belongs to the same update; each flush of an update is a round.

    Where several ranks train, they flush together: of a metric the mean counts, over those that have logged it. Files
    are those of rank 0.

    Args:
        journal: Journal of the run.
        update_counter: Position of the run.
        metric_property_provider: Knows which direction of a metric is better.
        check_key: Raises a ConfigError for a key that the tracker would refuse; a TrackerError if it cannot be asked.
        is_logged: Returns whether a point is recorded already: of updates that are computed again after a resume.
        artifacts_dir: The artifact root of the run.
        prefix: Prefix of every key: ``evaluate=`` records its metrics beside those of training.
        agree: Where several ranks train, returns the metrics that they agree on, from those of this one.
        takes_files: Whether files are logged: not on the ranks that do not record the run.

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
        artifacts_dir: Path,
        prefix: str = "",
        agree: Callable[[Mapping[str, float]], dict[str, float]] | None = None,
        takes_files: bool = True,
    ) -> None:
        self.source = ""
        self.prefix = prefix
        self._postfix = ""
        self.is_ahead = False
        self.summary: dict[str, Summary] = {}
        self._journal = journal
        self._counter = update_counter
        self._properties = metric_property_provider
        self._check_key = check_key
        self._is_logged = is_logged
        self._artifacts_dir = artifacts_dir
        self._agree = agree
        self._takes_files = takes_files
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
        key = self._full(key)
        if type(value) is not float:
            value = self.snapshot(key, value)
        if logger is not None:
            value = _to_number(value)
            logger.info("%s: %s", key, format(value, format_str or ".4g"))
        with self._lock:
            if self._is_known(key):
                self._check_same(key, value, self.source)
                return
            if key not in self.summary:
                self._check(key)
            self._pending[key] = (value, self.source)

    def add_image(self, key: str, image: Any) -> None:
        """Log an image at the current update.

        Args:
            key: Its name: letters, digits, ``_``, ``-``, ``.`` and spaces, parts separated by ``/``. So for all files.
            image: Tensor or array of shape (height, width), (channels, height, width) or (height, width, channels) with
                1, 3 or 4 channels, or (images, channels, height, width) for a grid; integers from 0 to 255, or numbers
                from 0 to 1. Or an image of Pillow.

        Raises:
            KsuitError: It is no image. As for all files: it cannot be stored, the key cannot name a file, or has other
                content at this update; both callbacks are named.
        """
        self._add_files(file_formats.image_files, key, image)

    def add_figure(self, key: str, figure: Any) -> None:
        """Log a figure of Matplotlib as an image at the current update; closing it is the caller's."""
        self._add_files(file_formats.figure_files, key, figure)

    def add_histogram(self, key: str, values: Any, bins: int = 64) -> None:
        """Log how numbers are distributed at the current update.

        Args:
            key: Its name.
            values: Tensor or array of any shape; what is not finite is counted apart.
            bins: Number of bins, of the same width.
        """
        self._add_files(file_formats.histogram_files, key, values, bins)

    def add_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table at the current update.

        Args:
            key: Its name.
            columns: Names of the columns.
            rows: Rows of numbers, truth values, texts and None; anything else is stored as text.
        """
        self._add_files(file_formats.table_files, key, columns, rows)

    def add_text(self, key: str, text: str, logger: logging.Logger | None = None) -> None:
        """Log a text at the current update; with a logger, it is shown on the terminal as well."""
        if logger is not None:
            logger.info("%s: %s", self._full(key), text)
        self._add_files(file_formats.text_files, key, text)

    def add_file(self, key: str, path: str | Path) -> None:
        """Log a copy of a file, as it is now, at the current update."""
        self._add_files(file_formats.copied_file, key, Path(path))

    @contextmanager
    def postfix(self, name: str) -> Iterator[None]:
        """Let all keys that are logged in the block end in ``/name``; blocks may be nested.

        Args:
            name: The last part of the keys; if it is empty, they stay as they are, as for the live weights.
        """
        before = self._postfix
        if name:
            self._postfix += f"/{name}"
        try:
            yield
        finally:
            self._postfix = before

    def _full(self, key: str) -> str:
        return self.prefix + key + self._postfix

    def _add_files(self, encode: Callable[..., Contents], key: str, *content: Any) -> None:
        if not self._takes_files:
            return
        try:
            contents = encode(self._full(key), self._counter.update + self.is_ahead, *map(_to_array, content))
        except KsuitError as error:
            error.locate(_location(self.source))
            raise
        except Exception as error:  # of the libraries that encode it, or a file that cannot be read
            raise KsuitError(f"'{key}' cannot be stored: {error}", path=_location(self.source)) from error
        name = next(iter(contents))
        with self._lock:
            known = self._known_file(_file_key(name))
            if known is not None:
                self._check_same(known, contents, self.source)
            else:
                self._pending[name] = (contents, self.source)

    def _known_file(self, key: str) -> str | None:
        """Return the name of the file that was logged under a key at this update."""
        items = {**self._written, **self._pending}.items()
        names = (name for name, (value, _) in items if isinstance(value, dict) and _file_key(name) == key)
        return next(filter(self._is_known, names), None)

    def _is_known(self, key: str) -> bool:
        """Whether this was logged at this update."""
        return key in self._pending or (
            key in self._written and self._written_step == self._counter.update + self.is_ahead
        )

    def snapshot(self, key: str, value: Any) -> float | Tensor:
        """Return a value that does not change if the callback changes its tensor or array.

        Raises:
            KsuitError: It is not a number.
        """
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
        raise KsuitError(f"'{key}' has to be a number, not {found}", path=_location(self.source))

    def _check(self, key: str) -> None:
        try:
            self._check_key(key)
        except ConfigError as error:
            error.locate(_location(self.source))
            raise
        except TrackerError:  # nobody can be asked: training continues, and what is logged stays in the run's folder
            return

    def _check_same(self, key: str, value: _Value, source: str) -> None:
        """Check that a value is the one that was logged before at this update; this waits for a tensor's device."""
        before, earlier = (self._pending if key in self._pending else self._written)[key]
        if key not in self._pending and self._agree is None:  # of several ranks it may be the mean
            before = self._written_values.get(key, before)
        if isinstance(value, dict) or isinstance(before, dict):
            if value != before:
                raise KsuitError(
                    f"'{key}' is logged twice with different content, and before by {_location(earlier)}",
                    path=_location(source),
                )
            return
        old, new = _to_number(before), _to_number(value)
        if old != new and not (math.isnan(old) and math.isnan(new)):
            raise KsuitError(
                f"'{key}' is logged twice at update {self._counter.update + self.is_ahead}, "
                f"as {new!r}, and before by {_location(earlier)} as {old!r}",
                path=_location(source),
            )

    def start_rounds(self) -> None:
        """Start with the first round of an update."""
        self._rounds.clear()

    @property
    def has_pending(self) -> bool:
        """Whether something was logged since the last flush."""
        return bool(self._pending)

    def flush(self) -> dict[str, float]:
        """Write what was logged at this update to the journal and return it, by the keys that callbacks use.

        Raises:
            PeerError: The ranks do not flush together.
        """
        if not self._pending and self._agree is None:
            return {}
        with self._lock:
            pending, self._pending = self._pending, self._to_come.pop(0) if self._to_come else {}
        try:
            metrics = self._metrics(pending)
        except BaseException:  # another rank has failed: nothing of this is written
            self._to_come.insert(0, self._pending)
            self._pending = pending
            raise
        if self._agree is not None:
            pending = {**{key: (value, "") for key, value in metrics.items()}, **pending}
        step = self._counter.update
        files = {name: item[0] for name, item in pending.items() if isinstance(item[0], dict)}
        is_more = self._written_step == step
        self._written = {**self._written, **pending} if is_more else pending
        self._written_values = {**self._written_values, **metrics} if is_more else metrics
        self._written_step = step
        if metrics:
            self._rounds.append(metrics)
        is_logged = self._is_logged
        new = {key: value for key, value in metrics.items() if not is_logged(key, step)}
        if files:
            paths = {_file_key(name): name for name in files if not is_logged(name, step)}
            self._journal.append(step, new, files=paths, contents=self._missing(files))
        else:
            self._journal.append(step, new)
        self._summarize(metrics, step)
        if not self.prefix:
            return metrics
        return {key.removeprefix(self.prefix): value for key, value in metrics.items()}

    @property
    def written_files(self) -> list[Path]:
        """What was logged as files at the last update that something was logged at: the first file of each."""
        return [self._artifacts_dir / name for name, (value, _) in self._written.items() if isinstance(value, dict)]

    def _metrics(self, pending: Mapping[str, _Pending]) -> dict[str, float]:
        metrics = _to_numbers(pending)
        return metrics if self._agree is None else self._agree(metrics)

    def _missing(self, files: Mapping[str, Contents]) -> dict[Path, bytes]:
        """Return those that are not on the disk with this content, as they are after a resume."""
        contents = {self._artifacts_dir / path: data for item in files.values() for path, data in item.items()}
        return {path: data for path, data in contents.items() if not path.is_file() or path.read_bytes() != data}

    def mark(self) -> int:
        """Return a mark for ``discard``: the number of items that wait for the flush."""
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

        It maps each key to the value or the contents of files, the name of the callback, and the number of the round.
        """
        rounds = {key: number for number, metrics in enumerate(self._rounds) for key in metrics}
        rounds |= dict.fromkeys(self._pending, len(self._rounds))
        is_written = self._written_step == self._counter.update
        found = {**(self._written if is_written else {}), **self._pending}
        values = {**(self._written_values if is_written else {}), **self._metrics(self._pending)}
        return {
            key: [values.get(key, value), source, rounds.get(key, _WRITTEN)] for key, (value, source) in found.items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what was logged at this update; what was written is not written again."""
        written, rounds = {}, dict[int, dict[str, _Pending]]()
        is_written = self._written_step == self._counter.update
        for key, (value, source, *number) in state_dict.items():
            if isinstance(value, dict) and not self._takes_files:
                continue
            if is_written and key in self._written:  # by a callback that is new, before training
                self._check_same(key, value, source)
            elif number == [_WRITTEN]:
                written[key] = (value, source)
            else:
                rounds.setdefault(number[0] if number else 0, {})[key] = (value, source)
        values = {key: value for key, (value, _) in written.items() if not isinstance(value, dict)}
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


def _location(source: str) -> str:
    """Return the config path of who has logged something."""
    return source if source == SOURCE else f"callbacks.{source}"


def _to_array(value: Any) -> Any:
    """Return a tensor as an array, which does not change with it."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    is_short = value.is_floating_point() and value.element_size() < 4  # NumPy lacks some of these
    return (value.float() if is_short else value).numpy().copy()


def _file_key(path: str) -> str:
    """Return the key of a logged file: its kind and its name."""
    if path.startswith("images/"):
        return path.partition("+step+")[0].replace("~", "/")
    return path.rpartition("/")[0]


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
        elif isinstance(value, Tensor):
            numbers[key] = math.nan  # reserves its position in the order
            by_device.setdefault(value.device, {})[key] = value.reshape(())
    for device, tensors in by_device.items():
        dtype = widest_float(device)
        stacked = torch.stack([tensor.to(dtype) for tensor in tensors.values()])
        numbers.update(zip(tensors, stacked.tolist(), strict=True))
    return numbers
