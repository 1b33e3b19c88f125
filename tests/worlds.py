"""Ranks that are threads of one process: they exchange through memory, at the same time or in turns."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Condition
from time import monotonic
from typing import Any

import msgspec
from torch import Tensor

from ksuit_runner.distributed.part_tree import Node, PartTree
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import PeerError


class OneOf(World):
    """One of several ranks, without the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = self.local_rank = rank
        self.size = size


class Exchange:
    """What ranks that go on at the same time share.

    Attributes:
        notes: Notes by key.
        lost: Ranks that are no more.
        news: Is notified of both.
    """

    def __init__(self, size: int) -> None:
        self.notes: dict[str, bytes] = {}
        self.lost: set[int] = set()
        self.news = Condition()
        self._barrier = Barrier(size, timeout=20)
        self._values: list[Any] = [None] * size

    def gather(self, rank: int, value: Any) -> list[Any]:
        """Return the values of all ranks."""
        self._values[rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found


class Turns:
    """What ranks share of which one goes on until it waits for the others: they may use what a process has only once.

    After the first error none waits any more.
    """

    def __init__(self, size: int) -> None:
        self._size, self._turn = size, 0
        self._values: dict[int, dict[int, Any]] = defaultdict(dict)
        self._exchanges = [0] * size
        self._ended: set[int] = set()
        self._error: BaseException | None = None  # the first one
        self._changed = Condition()

    def gather(self, rank: int, value: Any) -> list[Any]:
        """Return the values of all ranks."""
        values = self._values[self._exchanges[rank]]
        self._exchanges[rank] += 1
        values[rank] = value
        self._pass_on(rank)
        self._wait(rank)
        if len(values) < self._size:
            raise self._error or RuntimeError("another rank has ended")
        return [values[each] for each in range(self._size)]

    def run(self, rank: int, function: Callable[[], Any]) -> Any:
        """Call a function when it is a rank's turn, and return what it returns."""
        self._wait(rank)
        try:
            return function()
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:
            self._ended.add(rank)
            self._pass_on(rank)

    def _wait(self, rank: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == rank or self._error)

    def _pass_on(self, rank: int) -> None:
        with self._changed:
            others = [(rank + step) % self._size for step in range(1, self._size + 1)]
            self._turn = next((other for other in others if other not in self._ended), -1)
            self._changed.notify_all()


class TogetherWorld(OneOf):
    """One of several ranks, with the others."""

    def __init__(self, shared: Exchange | Turns, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.shared = shared

    def gather(self, value: Any) -> list[Any]:
        gathered = self.shared.gather(self.rank, msgspec.msgpack.encode(value))
        return [msgspec.msgpack.decode(item) for item in gathered]

    def gather_tensors(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        gathered = self.shared.gather(self.rank, [item.clone() for item in tensors])
        return [[item.clone() for item in given] for given in gathered]

    def broadcast(self, value: Any) -> Any:
        return self.gather(value if self.rank == 0 else None)[0]


class ThreadWorld(TogetherWorld):
    """One of several ranks that also leave notes, and of which a test may let any one die."""

    shared: Exchange

    def post(self, key: str, value: Any) -> None:
        if self.rank in self.shared.lost:
            raise PeerError("this rank is lost to the others")
        with self.shared.news:
            self.shared.notes[key] = msgspec.msgpack.encode(value)
            self.shared.news.notify_all()

    def read(self, key: str, timeout_s: float) -> Any:
        end = monotonic() + timeout_s
        with self.shared.news:
            while key not in self.shared.notes:
                if self.shared.lost:
                    raise PeerError(f"rank {min(self.shared.lost)} is lost")
                if not self.shared.news.wait(max(0.0, end - monotonic())):
                    raise PeerError(f"no note {key.rpartition('/')[2]} in {timeout_s:g} s")
            return msgspec.msgpack.decode(self.shared.notes[key])

    def forget(self, key: str) -> None:
        with self.shared.news:
            del self.shared.notes[key]

    def lose(self) -> None:
        """Let this rank be lost, as after SIGKILL."""
        with self.shared.news:
            self.shared.lost.add(self.rank)
            self.shared.news.notify_all()


class Adding(Strategy):
    """Adds up what the ranks have, in the simplest way."""

    world: TogetherWorld

    def reduce(
        self, nodes: Mapping[Node, Sequence[Tensor | None]], parts: int, word: Sequence[float]
    ) -> tuple[list[Tensor | None], list[float]]:
        tree = PartTree[list[Tensor | None]](parts, _add)
        copies = {node: [item if item is None else item.clone() for item in given] for node, given in nodes.items()}
        found = self.world.shared.gather(self.world.rank, (copies, list(word)))
        for of_rank, _ in found:
            for node, values in of_rank.items():
                assert len(values) == len(self.bound)
                tree.put(node, values)
        total = [item if item is None else item.clone() for item in tree.total]
        return total, [sum(numbers) for numbers in zip(*(said for _, said in found), strict=True)]


def _add(left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor | None]:
    return [
        one if other is None else other if one is None else one + other for one, other in zip(left, right, strict=True)
    ]


def in_threads(size: int, function: Callable[[ThreadWorld], Any]) -> list[Any]:
    """Call a function on each of so many ranks at the same time, and return what it returns, or raise an error."""
    shared = Exchange(size)
    return _called([lambda rank=rank: function(ThreadWorld(shared, rank, size)) for rank in range(size)])


def in_turns(size: int, function: Callable[[World], Any]) -> list[Any]:
    """Call a function on each of so many ranks in turns; a single one is the real world of one process."""
    if size == 1:
        return [function(World())]
    shared = Turns(size)
    worlds = [TogetherWorld(shared, rank, size) for rank in range(size)]
    return _called([lambda world=world: shared.run(world.rank, lambda: function(world)) for world in worlds])


def _called(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(functions)) as threads:
        futures = [threads.submit(function) for function in functions]
    return [future.result() for future in futures]
