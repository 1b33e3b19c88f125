"""Tests for what several ranks exchange."""

from typing import Any

import pytest
import torch
from ranks import on_ranks

from ksuit_runner.distributed.connect import connect
from ksuit_runner.errors import PeerError


def exchange_plain() -> list[Any]:
    world = connect({"version": "1"})
    try:
        long = world.gather("x" * 5000 * world.rank)
        return [
            (world.rank, world.size, world.local_rank),
            world.gather({"rank": world.rank, "text": "ä", "none": None, "pair": (1, 2.5)}),
            [len(text) for text in long],
            world.broadcast(f"from {world.rank}"),
            world.broadcast([1] * 3000),
        ]
    finally:
        world.close()


def test_plain_values() -> None:
    for rank, (place, gathered, lengths, text, many) in enumerate(on_ranks(3, exchange_plain)):
        assert place == (rank, 3, rank)
        assert gathered == [{"rank": other, "text": "ä", "none": None, "pair": [1, 2.5]} for other in range(3)]
        assert (lengths, text, many) == ([0, 5000, 10000], "from 0", [1] * 3000)


def exchange_tensors() -> list[list[torch.Tensor]]:
    world = connect({})
    try:
        own = [torch.full((world.rank + 1, 2), world.rank, dtype=torch.bfloat16), torch.tensor(world.rank == 1)]
        return world.gather_tensors([*own, torch.empty(0, 3), torch.tensor([0.1, -0.0]).double()][: 4 - world.rank])
    finally:
        world.close()


def test_tensors_of_any_kind() -> None:
    for found in on_ranks(2, exchange_tensors):
        assert [len(tensors) for tensors in found] == [4, 3]
        for rank, tensors in enumerate(found):
            assert torch.equal(tensors[0], torch.full((rank + 1, 2), rank, dtype=torch.bfloat16))
            assert tensors[1].dtype == torch.bool and tensors[1].item() == (rank == 1)
            assert tensors[2].shape == (0, 3)
        assert torch.equal(found[0][3], torch.tensor([0.1, -0.0]).double())


def fail_and_recover() -> tuple[str, bool, list[int]]:
    world = connect({})
    try:
        if world.rank == 1:
            world.fail(ValueError("a bad sample"))
            error = ""
        else:
            with pytest.raises(PeerError) as caught:
                world.gather(None)
            error = str(caught.value)
        return error, world.recover(), world.gather(world.rank)
    finally:
        world.close()


def test_a_failed_rank_is_named_and_all_meet_again() -> None:
    results = on_ranks(3, fail_and_recover)
    text = "rank 1 has failed: a bad sample"
    assert results == [(text, True, [0, 1, 2]), ("", True, [0, 1, 2]), (text, True, [0, 1, 2])]
