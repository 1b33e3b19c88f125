"""Tests for parameters that are spread over ranks: units, gradients, clipping, the fused step, and copies."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from worlds import OneOf

from ksuit_runner.distributed.connect import connect
from ksuit_runner.distributed.ddp import DataParallel
from ksuit_runner.distributed.fsdp import ShardedParallel, has_fsdp
from ksuit_runner.distributed.fsdp_exchange import ReduceScatter
from ksuit_runner.distributed.part_tree import Node
from ksuit_runner.distributed.pieces import is_sharded, local
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.errors import ConfigError, PeerError
from ksuit_runner.models.base import ModelBase
from ksuit_runner.trainer.fused_adam import FusedStep
from ksuit_runner.trainer.gradients import clip_gradients, clip_values

pytestmark = pytest.mark.skipif(not has_fsdp(), reason="this version of torch has no FSDP2 that would do")
PARTS = 4


class Net(nn.Module):
    """Residual blocks whose rows do not divide, a scalar parameter, a buffer, and a layer that is never used."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 7)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7), nn.GELU()) for _ in range(3))
        self.head = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden) * self.scale


def batch(update: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(update)
    return torch.randn(10, 5, generator=generator), torch.randint(3, (10,), generator=generator)


def whole(model: nn.Module) -> dict[str, Tensor]:
    found = model.state_dict().items()
    return {name: (item.full_tensor() if is_sharded(item) else item).clone() for name, item in found}


def trained(strategy: Strategy) -> dict[str, Any]:
    """Train by hand, as a trainer does with a strategy, and return what there is to compare."""
    torch.manual_seed(0)
    model = ModelBase(Net())
    strategy.wrap(model)
    parameters = list(model.module.parameters())
    named = [{"params": list(model.module.named_parameters())}]
    optimizer = torch.optim.AdamW(named, lr=0.01, fused=True)  # type: ignore[arg-type]
    step, found = FusedStep(optimizer, strategy.local), {}
    for update in range(4):
        inputs, targets = batch(update)
        own = strategy.world.own(PARTS)
        for part in own:
            chosen = slice(10 * part // PARTS, 10 * (part + 1) // PARTS)
            loss = nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen], reduction="sum")
            strategy.before_backward(part == own[-1])
            loss.backward()
        gradients = [parameter.grad for parameter in parameters]
        sums, word = strategy.reduce({Node(2, 0): gradients}, PARTS, [float(len(own))])
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = gradient
        clip_values(parameters, 5.0, strategy)
        found["norm"] = clip_gradients(parameters, 0.5, strategy)
        step()
        found["word"], found["unused"] = word, model.module.unused.weight.grad
        for parameter in parameters:
            parameter.grad = None
    copy = model.copy().eval().requires_grad_(False)
    with torch.no_grad():
        found["outputs"], found["of_copy"] = model(batch(9)[0]), copy(batch(9)[0])
        for parameter in copy.module.parameters():
            local(parameter).zero_()
    assert list(map(id, model.module.parameters())) == list(map(id, parameters))  # what was gathered is freed again
    found["weights"], found["zeros"] = whole(model.module), whole(copy.module)
    found["held"] = sum(local(parameter).numel() for parameter in parameters)
    found["kinds"] = {type(state["exp_avg"]).__name__ for state in optimizer.state.values()}
    model.load({name: value + 1 for name, value in found["weights"].items()})
    found["loaded"] = whole(model.module)
    return found


def on_rank(replicas: int) -> dict[str, Any]:
    world = connect({})
    try:
        return trained(ShardedParallel(world, replicas=replicas))
    finally:
        world.close()


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (4, 2)])
def test_it_trains_like_one_process(ranks, replicas):
    expected = trained(Strategy())
    found = on_ranks(ranks, on_rank, replicas)
    total = sum(item.numel() for item in Net().parameters())
    for one in found:
        assert one["word"] == [PARTS]
        assert one["norm"].equal(found[0]["norm"])
        assert one["norm"].item() == pytest.approx(expected["norm"].item(), rel=1e-6)
        assert one["unused"] is None
        assert one["kinds"] == {"DTensor", "Tensor"}  # the scalar is on every rank
        for name, weights in one["weights"].items():
            assert torch.equal(weights, found[0]["weights"][name])
            assert torch.equal(one["loaded"][name], weights + 1)
            if name != "calls":
                torch.testing.assert_close(weights, expected["weights"][name], rtol=0, atol=1e-6)
                assert not one["zeros"][name].any()
        assert one["zeros"]["calls"] == one["weights"]["calls"]
        assert torch.equal(one["of_copy"], one["outputs"])
        torch.testing.assert_close(one["outputs"], expected["outputs"], rtol=0, atol=1e-5)
    assert sum(one["held"] for one in found) == replicas * (total - 1) + ranks


def failed(error: str) -> tuple[str, float]:
    """Train, while the last rank fails before its third forward pass, and return what the others get, and when."""
    world = connect({})
    try:
        model, began = ModelBase(Net()), time.monotonic()
        ShardedParallel(world).wrap(model)
        try:
            for forward in range(9):
                if world.rank == world.size - 1 and forward == 2:
                    raise ValueError(error)
                model(batch(0)[0]).sum().backward()
        except (ValueError, PeerError) as found:
            world.fail(found)
            return f"{type(found).__name__}: {found}", time.monotonic() - began
        raise AssertionError("no rank has failed")
    finally:
        world.close()


def test_a_rank_that_fails_is_named_to_those_that_wait_for_its_parameters():
    (waiting, after), (failing, _) = on_ranks(2, failed, "no more data")
    assert failing == "ValueError: no more data"
    assert waiting == "PeerError: rank 1 has failed: no more data"
    assert after < 15


def wrap(model: nn.Module, **settings: Any) -> None:
    ShardedParallel(OneOf(0, 2), **settings).wrap(ModelBase(model))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.head = nn.Linear(3, 3)
        self.head.weight = self.blocks[0].weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShardedParallel(OneOf(0, 4), replicas=3), "4 ranks cannot be divided into 3 groups"),
        (lambda: ShardedParallel(OneOf(0, 2), gather="half"), "precision or float32 is needed, not 'half'"),
        (lambda: wrap(Net(), sync_batchnorm=True), "only on GPUs"),
        (lambda: DataParallel(OneOf(0, 2), sync_batchnorm=True).wrap(ModelBase(Net())), "only on GPUs"),
        (lambda: wrap(Net(), units=["block.{}"]), "'block.{}' matches no module .* Did you mean 'blocks"),
        (lambda: wrap(Tied(), units=["blocks.{}"]), "'blocks.0' shares the parameter 'blocks.0.weight' with a module"),
        (lambda: wrap(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), units=[]), "several dtypes"),
        (lambda: wrap(nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)), "'weight' is not row-major"),
    ],
)
def test_mistakes_are_named_before_anything_is_exchanged(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_alone_it_is_one_process():
    model = ModelBase(Net())
    strategy = ShardedParallel()
    strategy.wrap(model)
    assert not strategy.is_sharded
    assert not any(map(is_sharded, model.parameters()))
    torch.testing.assert_close(trained(strategy)["norm"], trained(Strategy())["norm"], rtol=2e-7, atol=0)


def reduce_and_fail() -> tuple[list[float], float]:
    """Add up gradients together, and wait for a rank that fails before it does so again."""
    world = connect({}, timeout_s=60)
    try:
        group = dist.group.WORLD  # kept, as by FSDP2: then its connections stay open after a failure
        reduce, mine = ReduceScatter(world), torch.empty(2)
        reduce(mine, torch.arange(4.0) * (world.rank + 1), group, dist.ReduceOp.SUM)
        began = time.monotonic()
        if world.rank == 1:
            world.fail(ValueError("a bad sample"))
        else:
            with pytest.raises(PeerError, match="rank 1 has failed: a bad sample"):
                reduce(torch.empty(2), torch.ones(4), group, dist.ReduceOp.SUM)
        assert world.recover()
        groups = [dist.new_group([rank]) for rank in range(world.size)]  # replicas, which are added up by torch next
        if world.rank == 1:
            world.fail(ValueError("another one"))
        else:
            with pytest.raises(PeerError, match="rank 1 has failed: another one"):
                ReduceScatter(world, has_replicas=True)(mine.clone(), mine, groups[0], dist.ReduceOp.SUM)
        assert world.recover()
        return mine.tolist(), time.monotonic() - began
    finally:
        world.close()


def test_a_rank_that_fails_before_it_adds_up_gradients_is_noticed_at_once() -> None:
    (first, seconds), (second, _) = on_ranks(2, reduce_and_fail)
    assert (first, second) == ([0.0, 3.0], [6.0, 9.0]) and seconds < 30
