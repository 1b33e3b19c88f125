"""Tests for sums over the parts of a batch."""

from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch

from ksuit_runner.distributed.part_tree import Node, PartTree, nodes_of


def total(values: list[float], ranks: int) -> float:
    """Add up the values of parts as so many ranks do: each its own, and one of them what they have."""
    parts = len(values)
    tree = PartTree[float](parts, lambda left, right: left + right)
    each = -(-parts // ranks)
    for rank in range(ranks):
        own = PartTree[float](parts, lambda left, right: left + right)
        first, stop = min(rank * each, parts), min((rank + 1) * each, parts)
        for part in range(first, stop):
            own.put(Node(0, part), values[part])
        assert list(nodes_of(first, stop, parts)) == sorted(own.nodes, key=lambda node: node.place << node.level)
        for node, value in own.nodes.items():
            tree.put(node, value)
    return tree.total


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_any_number_of_ranks_rounds_in_the_same_way(parts: int) -> None:
    values = (torch.randn(parts, generator=torch.Generator().manual_seed(parts)) * 1e3).double().exp2().tolist()
    values = [min(value, 1e300) for value in values]
    totals = {total(values, ranks) for ranks in range(1, parts + 1)}
    assert len(totals) == 1
    exact = float(sum(map(Fraction, values)))
    assert totals.pop() == pytest.approx(exact, rel=1e-12)


def test_every_part_is_added_once() -> None:
    for parts in range(1, 40):
        for ranks in range(1, parts + 1):
            assert total([float(1 << part) for part in range(parts)], ranks) == 2.0**parts - 1


def test_neighbours_are_added_first() -> None:
    def brackets(parts: int) -> str:
        tree = PartTree[str](parts, lambda left, right: f"({left}{right})")
        for part in range(parts):
            tree.put(Node(0, part), str(part))
        return tree.total

    assert [brackets(parts) for parts in (1, 2, 3, 4, 6)] == ["0", "(01)", "((01)2)", "((01)(23))", "(((01)(23))(45))"]


def test_what_a_rank_waits_with() -> None:
    def nodes(first: int, stop: int, parts: int) -> Iterator[tuple[int, int]]:
        return (tuple(node) for node in nodes_of(first, stop, parts))

    assert list(nodes(0, 2, 4)) == [(1, 0)]
    assert list(nodes(0, 3, 6)) == [(1, 0), (0, 2)]
    assert list(nodes(3, 6, 6)) == [(0, 3), (2, 1)]
    assert list(nodes(4, 4, 4)) == []
