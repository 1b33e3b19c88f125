"""The ranks that train a run together, as one of them sees them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ksuit_runner.errors import PeerError


class World:
    """The processes that train a run together; this class is the world of a single one.

    Whatever the ranks exchange is asked for by all of them, in the same order. Where another rank has failed, is lost
    or does not answer in time, they get a ``PeerError`` instead of an answer.

    Attributes:
        rank: Number of this process, from 0. Rank 0 records the run.
        size: Number of processes.
        local_rank: Number of this process among those of its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def records(self) -> bool:
        """Whether this rank is the one that records the run."""
        return self.rank == 0

    def own(self, count: int, rank: int | None = None) -> range:
        """Return which parts of a batch belong to a rank: neighbouring ones, the same number for each rank.

        If the parts cannot be divided evenly, the last ranks have fewer, or none.

        Args:
            count: Number of parts.
            rank: Number of the rank; by default that of this one.
        """
        rank = self.rank if rank is None else rank
        each = -(-count // self.size)
        return range(min(rank * each, count), min((rank + 1) * each, count))

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order.

        Args:
            value: Plain: None, numbers, text, bytes, and lists, tuples and dicts of these; a tuple arrives as a list.

        Raises:
            PeerError: A rank has failed, is lost, or does not answer in time.
        """
        return [value]

    def exchange(self, what: str, value: Any = None) -> list[Any]:
        """Return the values that all ranks give for the same purpose, in their order; without values, wait for all.

        Args:
            what: What it is for.
            value: A plain value, see ``gather``.

        Raises:
            PeerError: A rank is somewhere else, has failed, or is lost.
        """
        if self.size == 1:
            return [value]
        found = self.gather([what, value])
        places = [each[0] if isinstance(each, list) and len(each) == 2 else "a callback" for each in found]
        if any(place != what for place in places):
            listed = ", ".join(f"rank {rank}: {place}" for rank, place in enumerate(places))
            raise PeerError(f"the ranks of the run are at different places; {listed}")
        return [value for _, value in found]

    def gather_tensors(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the tensors of all ranks, in their order; ranks may have others, of any number, shape and dtype.

        Args:
            tensors: Dense tensors, on any device; those of other ranks arrive on the CPU.

        Raises:
            PeerError: As ``gather``.
        """
        return [list(tensors)]

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0; that of other ranks is not looked at. See ``gather``."""
        return value

    def post(self, key: str, value: Any) -> None:
        """Leave a note for the other ranks; unlike the exchanges, in any thread and at any time. See ``gather``."""

    def read(self, key: str, timeout_s: float) -> Any:
        """Return a note as soon as it is there; in any thread.

        Raises:
            PeerError: It is not there in time, or the rank that would leave it has failed or is lost.
        """
        raise NotImplementedError("a single process has nobody who leaves notes")

    def forget(self, key: str) -> None:
        """Remove a note that nobody will read any more; in any thread."""

    def explain(self, error: BaseException) -> BaseException:
        """Return the real cause of an error: a ``PeerError`` if another rank has left an exchange of torch."""
        return error

    def fail(self, error: BaseException) -> None:
        """Let the other ranks know that this one has failed: what they wait for raises a ``PeerError``."""

    def recover(self) -> bool:
        """After an error, wait for all ranks to notice it, and return whether all are there and can exchange again."""
        return True

    def close(self) -> None:
        """Leave the others, so that every process can exit."""
