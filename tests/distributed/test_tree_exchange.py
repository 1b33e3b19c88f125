"""Tests for sums over the parts of all ranks."""

from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from ksuit_runner.distributed.connect import connect
from ksuit_runner.distributed.part_tree import Node, PartTree
from ksuit_runner.distributed.tree_exchange import TreeExchange
from ksuit_runner.distributed.world import World

SHAPES = ((3, 5), (7,), (), (2, 2), (4,))
ABSENT, SOMETIMES = 3, 4
# Bytes of a bucket, and bytes that all ranks get: one small message, one bucket, one bucket for each parameter.
WAYS = ((1 << 20, 1 << 20), (1 << 20, 0), (1, 0))
NUMBERS = ([1.0, 0.1], [2.0, 1e16])


def gradients_of(part: int, update: int) -> list[Tensor | None]:
    """Return gradients of a part: one parameter never has any, and another one in every second part of an update."""
    generator = torch.Generator().manual_seed(part)
    found: list[Tensor | None] = [torch.randn(shape, generator=generator).exp() * 1e3 for shape in SHAPES]
    found[0] = torch.full((3, 5), -0.0)
    found[1] = torch.randn(7, generator=generator).to(torch.bfloat16)
    is_absent = (ABSENT, *([SOMETIMES] if part % 2 or update else []))
    return [None if index in is_absent else item for index, item in enumerate(found)]


def add(left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor | None]:
    pairs = zip(left, right, strict=True)
    return [a if b is None else b if a is None else a + b for a, b in pairs]


def own_nodes(own: range, parts: int, update: int) -> dict[Node, list[Tensor | None]]:
    tree = PartTree(parts, add)
    for part in own:
        tree.put(Node(0, part), gradients_of(part, update))
    return tree.nodes


def reduced(many: list[int]) -> list[Any]:
    world, found = connect({}), []
    like = [torch.empty(shape, dtype=torch.bfloat16 if i == 1 else torch.float32) for i, shape in enumerate(SHAPES)]
    try:
        for parts in many:
            for way in WAYS:
                exchange = TreeExchange(world, like, parts, 2, *way)
                for update, numbers in enumerate(NUMBERS):
                    nodes = own_nodes(world.own(parts), parts, update)
                    found.append(exchange.add_up(nodes, [numbers[0] * world.rank, numbers[1]]))
                lost = own_nodes(world.own(parts), parts, 0) if world.rank else {}
                found.append(exchange.add_up(lost, [1.0, 1.0]))
        return found
    finally:
        world.close()


@pytest.mark.parametrize(("ranks", "many"), [(2, [2, 4, 6]), (4, [4, 8, 12]), (3, [3])])
def test_any_number_of_ranks_has_the_gradients_of_one_process(ranks: int, many: list[int]) -> None:
    for found in on_ranks(ranks, reduced, many):
        rest = iter(found)
        for parts in many:
            for _ in WAYS:
                for update, numbers in enumerate(NUMBERS):
                    gradients, sums = next(rest)
                    assert sums[0] == numbers[0] * sum(range(ranks))
                    assert sums[1] == pytest.approx(ranks * numbers[1])
                    [expected] = own_nodes(World().own(parts), parts, update).values()
                    for ours, theirs in zip(gradients, expected, strict=True):
                        assert (ours is None) == (theirs is None)
                        if ours is not None:
                            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
                            assert ours.reshape(-1).view(torch.uint8).equal(theirs.reshape(-1).view(torch.uint8))
                assert next(rest) == ([None] * len(SHAPES), [ranks, ranks])
