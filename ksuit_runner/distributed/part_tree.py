"""Sums over the parts of a batch in an order that depends on the number of parts only, and not on who has them.

The parts are the leaves of a binary tree: neighbours are added first, then neighbouring pairs, and so on; a node
without a neighbour rises as it is. A rank adds up its own part of the tree, and the ranks together the rest, so that
1, 2 and 4 ranks round in the same way.
"""

from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")


class Node(NamedTuple):
    """A node of the tree: the sum of ``2 ** level`` neighbouring parts, or of fewer at the end.

    Attributes:
        level: Height above the parts, which have 0.
        place: Number of the node on its level, from 0.
    """

    level: int
    place: int


class PartTree(Generic[Value]):
    """Adds up values of parts, each sum as soon as both of its sides are there.

    Args:
        parts: Number of parts of the whole batch, over all ranks.
        add: Adds the value of a right neighbour to that of a left one; it may change and return the left one.

    Attributes:
        nodes: The sums that wait for a neighbour.
    """

    def __init__(self, parts: int, add: Callable[[Value, Value], Value]) -> None:
        self.nodes: dict[Node, Value] = {}
        self._parts = parts
        self._add = add

    def put(self, node: Node, value: Value) -> Value:
        """Add the value of a part, ``Node(0, part)``, or of a node that others have summed up, and return the sum."""
        level, place = node
        while not self._is_root(level):
            neighbour = Node(level, place ^ 1)
            if (neighbour.place << level) < self._parts:
                if neighbour not in self.nodes:
                    break
                other = self.nodes.pop(neighbour)
                value = self._add(value, other) if place < neighbour.place else self._add(other, value)
            level, place = level + 1, place >> 1
        self.nodes[Node(level, place)] = value
        return value

    def pop_left(self, part: int) -> tuple[Node, Value | None]:
        """Take out the sum that a part is added to first, if there is one, so that the caller can add the part itself.

        Returns:
            The node to put the sum, or else the part, and the sum up to now, or None.
        """
        level, place = 0, part
        while not self._is_root(level):
            neighbour = Node(level, place ^ 1)
            level, place = level + 1, place >> 1
            if (neighbour.place << neighbour.level) < self._parts:
                if neighbour in self.nodes and neighbour.place & 1 == 0:
                    return Node(level, place), self.nodes.pop(neighbour)
                break
        return Node(0, part), None

    @property
    def total(self) -> Value:
        """The sum over all parts; an assertion that they are all there."""
        [(node, value)] = self.nodes.items()
        assert self._is_root(node.level), f"of {self._parts} parts some are missing"
        return value

    def _is_root(self, level: int) -> bool:
        return self._parts <= 1 << level


def nodes_of(first: int, stop: int, parts: int) -> Iterator[Node]:
    """Yield the nodes in which a ``PartTree`` leaves the parts from ``first`` to before ``stop``, in order.

    Args:
        first: First part.
        stop: Part after the last one.
        parts: Number of parts of the whole batch.
    """
    tree = PartTree[None](parts, lambda left, right: None)
    for part in range(first, stop):
        tree.put(Node(0, part), None)
    yield from sorted(tree.nodes, key=lambda node: node.place << node.level)
