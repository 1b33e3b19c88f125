"""Tests for gradients that several ranks add up."""

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from ksuit_runner.distributed.connect import connect
from ksuit_runner.distributed.ddp import DataParallel
from ksuit_runner.distributed.part_tree import Node, PartTree

SHAPES = ((3, 5), (7,), (), (2, 2), (4,))
ABSENT, SOMETIMES = 3, 4


def gradients_of(part: int) -> list[Tensor | None]:
    """Return gradients of a part: one parameter never has any, and another one in every second part."""
    generator = torch.Generator().manual_seed(part)
    found: list[Tensor | None] = [torch.randn(shape, generator=generator).exp() * 1e3 for shape in SHAPES]
    found[1] = found[1].to(torch.bfloat16)
    return [None if i == ABSENT or (i == SOMETIMES and part % 2) else item for i, item in enumerate(found)]


def add(left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor | None]:
    pairs = zip(left, right, strict=True)
    return [a if b is None else b if a is None else a + b for a, b in pairs]


def own_nodes(world, parts: int) -> dict[Node, list[Tensor | None]]:
    tree = PartTree(parts, add)
    for part in world.own(parts):
        tree.put(Node(0, part), gradients_of(part))
    return tree.nodes


def reduced(parts: int) -> list[tuple[list[Tensor | None], list[float]]]:
    world = connect({})
    try:
        strategy = DataParallel(world)
        words = [[1.0, float(world.rank), 0.1 * (update + 1)] for update in range(2)]
        return [strategy.reduce(own_nodes(world, parts), parts, word) for word in words]
    finally:
        world.close()


@pytest.mark.parametrize(("ranks", "parts"), [(2, 2), (2, 6), (4, 4)])
def test_any_number_of_ranks_has_the_gradients_of_one_process(ranks: int, parts: int) -> None:
    tree = PartTree(parts, add)
    for part in range(parts):
        tree.put(Node(0, part), gradients_of(part))
    for updates in on_ranks(ranks, reduced, parts):
        for update, (gradients, word) in enumerate(updates):
            assert word == [ranks, sum(range(ranks)), pytest.approx(ranks * 0.1 * (update + 1))]
            assert gradients[ABSENT] is None
            for found, expected in zip(gradients, tree.total, strict=True):
                assert (found is None) == (expected is None)
                assert found is None or (found.dtype == expected.dtype and torch.equal(found, expected))
