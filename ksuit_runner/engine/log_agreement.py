"""What the ranks of a run agree on when they write their logs together."""

from collections.abc import Mapping, Sequence

from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.distributed.world import World


class LogAgreement:
    """Has all ranks log the same metrics, request the same checkpoints, and stop after the same update.

    Args:
        world: The ranks.
        counter: Position of the run.
        checkpoint_writer: Writes its checkpoints.
    """

    def __init__(self, world: World, counter: UpdateCounter, checkpoint_writer: CheckpointWriter) -> None:
        self._world = world
        self._counter = counter
        self._checkpoint_writer = checkpoint_writer

    def __call__(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics that all ranks record; if one requests a checkpoint or stops training, all do.

        Args:
            metrics: What this rank has logged.

        Raises:
            PeerError: The ranks do not come together.
        """
        counter, writer = self._counter, self._checkpoint_writer
        said = [list(metrics.items()), writer.requested, counter.stopped_by if counter.stopped else []]
        found = self._world.exchange(f"the log of update {counter.update}", said)
        for _, requested, _ in found:
            for tag in requested:
                writer.request(tag)
        for name in dict.fromkeys(name for _, _, stopped_by in found for name in stopped_by):
            if not counter.stopped or name not in counter.stopped_by:
                counter.stop(name)
        return mean_of_ranks([dict(items) for items, _, _ in found])


def mean_of_ranks(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every metric over the ranks that have it; a value that is the same on all stays as it is."""
    values: dict[str, list[float]] = {}
    for of_rank in metrics:
        for key, value in of_rank.items():
            values.setdefault(key, []).append(value)
    return {key: each[0] if _are_same(each) else sum(each) / len(each) for key, each in values.items()}


def _are_same(values: Sequence[float]) -> bool:
    first = values[0]
    return all(value == first or (value != value and first != first) for value in values)
