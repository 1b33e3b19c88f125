"""The log writer as a training step sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ksuit_runner.distributed.world import World
from ksuit_runner.errors import KsuitError

if TYPE_CHECKING:
    from ksuit_runner.log_writer import LogWriter

SOURCE = "trainer"
"""Who has logged it, for messages."""


class StepWriter:
    """Logs what a training step computes besides its losses, at the update that it is a part of.

    A batch may be computed in parts, each by a training step of its own. Then a metric is the mean over the parts of
    all ranks, weighted by their samples; images, tables and the like are those of the first part. Nothing is logged for
    an update that fails or is skipped, nor in evaluations, which call ``training_step`` as well: there callbacks log.

    Args:
        batch_size: Returns the number of samples in a part of the batch.
        world: The ranks of the run.
    """

    def __init__(self, batch_size: Callable[[Any], float], world: World) -> None:
        self._batch_size = batch_size
        self._world = world
        self._writer: LogWriter | None = None
        self._part: Any = None
        self._is_logging = self._is_first = False
        self._values: dict[str, list[tuple[float | Tensor, float]]] = {}  # in the order of the parts, with weights
        self._of_part: dict[str, float | Tensor] = {}

    def attach(self, writer: LogWriter) -> None:
        """Log to the writer of a run."""
        self._writer = writer

    def start(self) -> None:
        """Start with an update."""
        self._is_first = True
        self._values.clear()

    def begin(self, part: Any) -> None:
        """Log what is computed from now on, from a part of the batch."""
        self._part, self._is_logging = part, self._writer is not None
        self._of_part.clear()

    def end(self) -> None:
        """Log nothing from now on: the step has ended."""
        self._part, self._is_logging, self._is_first = None, False, False

    @property
    def has_logged(self) -> bool:
        """Whether this rank has logged metrics in this update."""
        return bool(self._values)

    def flush(self) -> None:
        """Hand the means over the parts to the run's writer; every rank does so if one of them has logged something.

        Raises:
            PeerError: A rank has failed, is lost, or does not answer in time.
        """
        if self._world.size > 1:
            self._values = self._of_all_ranks()
        for key, values in self._values.items():
            if len(values) == 1:
                self._target().add_scalar(key, values[0][0])
            else:
                mean = sum(value * weight for value, weight in values) / sum(weight for _, weight in values)
                self._target().add_scalar(key, mean)
        self._values.clear()

    def _of_all_ranks(self) -> dict[str, list[tuple[float | Tensor, float]]]:
        own = [(key, *item) for key, values in self._values.items() for item in values]
        plain = self._world.gather([[key, None if isinstance(value, Tensor) else value, by] for key, value, by in own])
        tensors = self._world.gather_tensors([value for _, value, _ in own if isinstance(value, Tensor)])
        merged: dict[str, list[tuple[float | Tensor, float]]] = {}
        for items, found in zip(plain, tensors, strict=True):
            rest = iter(found)
            for key, value, weight in items:
                merged.setdefault(key, []).append((next(rest).cpu() if value is None else value, weight))
        return merged

    def discard(self) -> None:
        """Discard what the update has logged."""
        self._values.clear()
        if self._writer is not None:
            self._writer.discard_of({SOURCE})

    def add_scalar(self, key: str, value: float | Tensor) -> None:
        """Log a metric, as ``LogWriter.add_scalar``; a tensor stays on its device."""
        if not self._is_logging:
            return
        value = self._target().snapshot(key, value)
        if key in self._of_part:
            old, new = float(self._of_part[key]), float(value)
            if old != new and not (isnan(old) and isnan(new)):
                raise KsuitError(f"training_step logs '{key}' twice, as {old!r} and as {new!r}", path=SOURCE)
            return
        self._of_part[key] = value
        self._values.setdefault(key, []).append((value, self._batch_size(self._part)))

    def add_image(self, key: str, image: Any) -> None:
        """Log an image, as ``LogWriter.add_image``."""
        if self._is_logging and self._is_first:
            self._target().add_image(key, image)

    def add_figure(self, key: str, figure: Any) -> None:
        """Log a figure, as ``LogWriter.add_figure``."""
        if self._is_logging and self._is_first:
            self._target().add_figure(key, figure)

    def add_histogram(self, key: str, values: Any, bins: int = 64) -> None:
        """Log a histogram, as ``LogWriter.add_histogram``."""
        if self._is_logging and self._is_first:
            self._target().add_histogram(key, values, bins)

    def add_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table, as ``LogWriter.add_table``."""
        if self._is_logging and self._is_first:
            self._target().add_table(key, columns, rows)

    def add_text(self, key: str, text: str) -> None:
        """Log a text, as ``LogWriter.add_text``."""
        if self._is_logging and self._is_first:
            self._target().add_text(key, text)

    def add_file(self, key: str, path: str | Path) -> None:
        """Log a copy of a file, as ``LogWriter.add_file``."""
        if self._is_logging and self._is_first:
            self._target().add_file(key, path)

    def _target(self) -> LogWriter:
        assert self._writer is not None, "it is not attached to a run"
        self._writer.source = SOURCE
        return self._writer
