"""Ranks in one process, each in a thread, which take turns: one computes until it waits for the others."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from threading import Condition, Thread
from typing import Any

from torch import Tensor

from ksuit_runner.distributed.part_tree import Node, PartTree
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.distributed.world import World


class Turns:
    """Whose turn it is, and what has been exchanged."""

    def __init__(self, size: int) -> None:
        self.size, self.turn = size, 0
        self.values: dict[int, dict[int, Any]] = defaultdict(dict)
        self.ended: set[int] = set()
        self.errors: list[BaseException] = []
        self._changed = Condition()

    def wait(self, rank: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.turn == rank or self.errors)

    def pass_on(self, rank: int) -> None:
        with self._changed:
            others = [(rank + step) % self.size for step in range(1, self.size + 1)]
            self.turn = next((other for other in others if other not in self.ended), -1)
            self._changed.notify_all()

    def run(self, rank: int, function: Callable[[], None]) -> None:
        self.wait(rank)
        try:
            function()
        except BaseException as error:
            self.errors.append(error)
        self.ended.add(rank)
        self.pass_on(rank)


class InTurns(World):
    """One of the ranks."""

    def __init__(self, turns: Turns, rank: int) -> None:
        self.rank, self.size, self.local_rank = rank, turns.size, rank
        self._turns, self._exchanges = turns, 0

    def gather(self, value: Any) -> list[Any]:
        turns, values = self._turns, self._turns.values[self._exchanges]
        self._exchanges += 1
        values[self.rank] = value
        turns.pass_on(self.rank)
        turns.wait(self.rank)
        if len(values) < self.size:
            raise RuntimeError("another rank has ended")
        return [values[rank] for rank in range(self.size)]

    def gather_tensors(self, tensors: Sequence[Any]) -> list[list[Any]]:
        found = self.gather([tensor.clone() for tensor in tensors])
        return [[tensor.clone() for tensor in given] for given in found]

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


class Adding(Strategy):
    """Adds up what the ranks have, in the simplest way."""

    def reduce(
        self, nodes: Mapping[Node, Sequence[Tensor | None]], parts: int, word: Sequence[float]
    ) -> tuple[list[Tensor | None], list[float]]:
        tree = PartTree[list[Tensor | None]](parts, _add)
        copies = {node: [item if item is None else item.clone() for item in given] for node, given in nodes.items()}
        found = self.world.gather((copies, list(word)))
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


def worlds(size: int) -> list[World]:
    """Return the world of each of so many ranks; of a single one the real one."""
    turns = Turns(size)
    return [InTurns(turns, rank) for rank in range(size)] if size > 1 else [World()]


def together(worlds: Sequence[World], functions: Sequence[Callable[[], None]]) -> None:
    """Call one function for each rank; raise the first error."""
    if len(functions) == 1:
        functions[0]()
        return
    assert isinstance(worlds[0], InTurns)
    turns = worlds[0]._turns
    threads = [Thread(target=turns.run, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if turns.errors:
        raise turns.errors[0]
