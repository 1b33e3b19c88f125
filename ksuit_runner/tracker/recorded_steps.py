"""Which points a store has already: the delivery may send a batch twice."""

from collections.abc import Iterable
from typing import TypeVar

from ksuit_runner.record.point import LoggedFile, Point

Logged = TypeVar("Logged", Point, LoggedFile)


class RecordedSteps:
    """The last step and the latest timestamp of every metric, by which points that are recorded are recognized.

    Logged files are recognized in the same way, by their keys.

    Points are delivered in the order of the journal. So a point is new if its step is later than all of its metric,
    or, for an older checkpoint that is evaluated, if it was logged later than all of them.

    Args:
        points: Points that the store has.
    """

    def __init__(self, points: Iterable[Point | LoggedFile] = ()) -> None:
        self._last: dict[str, tuple[int, int]] = {}
        self.add(points)

    @property
    def steps(self) -> dict[str, int]:
        """The last step of every metric."""
        return {key: step for key, (step, _) in self._last.items()}

    def add(self, points: Iterable[Point | LoggedFile]) -> None:
        """Count points as recorded."""
        for key, _, step, timestamp in points:
            last_step, latest = self._last.get(key, (step, timestamp))
            self._last[key] = max(step, last_step), max(timestamp, latest)

    def new(self, points: Iterable[Logged]) -> list[Logged]:
        """Return those of a batch that are not recorded yet."""
        return [point for point in points if self._is_new(point)]

    def _is_new(self, point: Point | LoggedFile) -> bool:
        last = self._last.get(point.key)
        return last is None or point.step > last[0] or point.timestamp > last[1]
