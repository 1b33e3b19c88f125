"""Checkpoints of what FSDP2 has spread over ranks, which are real processes here: written by some, read by others."""

from functools import partial
from pathlib import Path

import torch
from ranks import on_ranks
from torch import nn

from ksuit_runner.checkpoint.base_weights import BASE, BaseWeights, checksum, with_base
from ksuit_runner.checkpoint.folders import damage, names
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.data.container import DataContainer
from ksuit_runner.data.tensor_dataset import TensorDataset
from ksuit_runner.distributed.connect import connect
from ksuit_runner.distributed.fsdp import ShardedParallel
from ksuit_runner.distributed.pieces import gathered, is_sharded, local, place
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.distributed.world import World
from ksuit_runner.models.base import ModelBase
from ksuit_runner.paths import PathProvider
from ksuit_runner.schedule import constant
from ksuit_runner.trainer.sgd import SgdTrainer

FROZEN = ("0.weight", "0.bias")


def trainer_of(world: World):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    model[0].requires_grad_(False)
    data = DataContainer({"train": TensorDataset(torch.zeros(12, 4), torch.zeros(12), (3,))}, 6, seed=0, world=world)
    return SgdTrainer(
        ModelBase(model),
        data,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        schedule=constant,
        loss=nn.CrossEntropyLoss(),
        max_updates=2,
        accumulation_steps=world.size,
        strategy=ShardedParallel(world) if world.size > 1 else Strategy(world),
    )


def whole_state(trainer, world):
    """Return the weights and the state of the optimizer, as a single process has them."""
    states = trainer.state_dict()["optimizer"]["parameters"]
    named = [*trainer.model.tensors().items()]
    named += [(f"{name}/{key}", value) for name, state in states.items() for key, value in state.items()]
    return {name: gathered(value, world).clone() for name, value in named}


def frozen(trainer):
    return {name: value for name, value in trainer.model.module.named_parameters() if not value.requires_grad}


def save(folder: Path):
    """Train for an update with gradients that are given, and save it without what is frozen."""
    world = connect({})
    trainer, paths = trainer_of(world), PathProvider(folder, "run00000")
    base = BaseWeights(frozen(trainer), world)
    for number, parameter in enumerate(trainer.optimizers.parameters):
        if parameter.requires_grad:
            parameter.grad = place(torch.full(parameter.shape, float(number + 1)), parameter)
    trainer.optimizer.step()
    trainer.counter.update = 1
    unchanged = base.unchanged(frozen(trainer))
    assert tuple(unchanged) == FROZEN
    state = trainer.state_dict()
    state.pop("callbacks", None)
    writer = CheckpointWriter(paths, world=world, content="trained")
    model, whole = trainer.model.tensors(), {"trainer": state, BASE: unchanged}
    left_out = {name: frozen(trainer)[name] for name in unchanged}
    writer.check(model, whole, left_out)
    writer.save(trainer.counter, model, whole, wait=True, base=left_out)
    found = whole_state(trainer, world)
    held = frozen(trainer)["0.weight"]
    if world.rank == 0:  # a rank that changes what it holds of a frozen weight makes all of them store it
        local(held)[:] = 5
    changed = base.unchanged(frozen(trainer))
    assert tuple(changed) == ("0.bias",) and checksum(held, world) != unchanged["0.weight"]
    writer.close()
    world.close()
    return found


def load(folder: Path):
    return loaded(folder, connect({}))


def loaded(folder: Path, world: World):
    trainer, paths = trainer_of(world), PathProvider(folder, "run00000")
    checkpoint = read_newest(paths, world=world)
    assert checkpoint.base.keys() == set(FROZEN) and not checkpoint.model.keys() & set(FROZEN)
    trainer.model.load(with_base(checkpoint.model, checkpoint.base, trainer.model.tensors(), world))
    trainer.load_state_dict(checkpoint.state["trainer"])
    if world.size > 1:
        assert is_sharded(trainer.optimizer.state[trainer.optimizers.parameters[-1]]["exp_avg"])
    found = whole_state(trainer, world)
    world.close()
    return found


def test_state_that_is_spread_over_ranks_comes_back_on_any_number_of_them(tmp_path):
    saved, other = on_ranks(2, save, tmp_path)
    paths = PathProvider(tmp_path, "run00000")
    (name,) = names(paths)
    assert damage(paths.checkpoints_dir / name) is None
    assert "1.weight/exp_avg" in saved and saved.keys() == other.keys()
    for found in (loaded(tmp_path, World()), *on_ranks(2, load, tmp_path), *on_ranks(3, load, tmp_path)):
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[key], value) for key, value in saved.items())
