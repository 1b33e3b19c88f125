"""Tests for data parallel training."""

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

from ksuit_runner.distributed.connect import connect
from ksuit_runner.distributed.ddp import DataParallel
from ksuit_runner.distributed.part_tree import Node
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import KsuitError


def train_once() -> tuple[dict[str, Tensor], list[Tensor | None], list[float]]:
    world = connect({})
    try:
        strategy = DataParallel(world)
        torch.manual_seed(world.rank)
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Embedding(4, 2, sparse=True))
        strategy.wrap(model)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        strategy.bind([model[0].weight])
        gradient = torch.full((2, 3), 1.0 + world.rank)
        gradients, word = strategy.reduce({Node(0, world.rank): [gradient]}, 2, [world.rank])
        model[2](torch.tensor([1])).sum().backward()
        with pytest.raises(KsuitError, match="dense gradients only"):
            strategy.reduce({Node(0, world.rank): [model[2].weight.grad]}, 2, [0.0])
        return weights, gradients, word
    finally:
        world.close()


def test_ranks_begin_with_the_weights_of_rank_0_and_share_gradients() -> None:
    (first, *_), (second, *_) = results = on_ranks(2, train_once)
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    for _, gradients, word in results:
        assert torch.equal(gradients[0], torch.full((2, 3), 3.0)) and word == [1.0]


def test_one_process_needs_no_exchange() -> None:
    gradient = torch.ones(2)
    gradients, word = DataParallel(World()).reduce({Node(0, 0): [gradient, None]}, 1, [2.0])
    assert gradients[0] is gradient and gradients[1] is None and word == [2.0]
