"""Norms and the like, and the exported model, where parameters are spread over two ranks: those of one process."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn
from torch.optim import AdamW
from torch.testing._internal.distributed.fake_pg import FakeStore
from worlds import OneOf

from callbacks.activation_norms import ActivationNorms
from callbacks.dead_units import DeadUnits
from callbacks.export_model import ExportModel
from callbacks.gradient_noise_scale import GradientNoiseScale
from callbacks.gradient_norms import GradientNorms
from callbacks.gradient_spikes import GradientSpikes
from callbacks.nan_watch import NanWatch
from callbacks.unused_parameters import UnusedParameters
from callbacks.update_norms import UpdateNorms
from callbacks.weight_norms import WeightNorms
from ksuit_runner.data.container import DataContainer
from ksuit_runner.data.digits import Digits
from ksuit_runner.distributed.connect import connect
from ksuit_runner.distributed.fsdp import ShardedParallel, has_fsdp
from ksuit_runner.engine.assembly import build_run
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import ConfigError
from ksuit_runner.keyed_random import keyed
from ksuit_runner.models.base import ModelBase
from ksuit_runner.paths import PathProvider
from ksuit_runner.schedule import constant
from ksuit_runner.testing import build_callbacks
from ksuit_runner.trainer.sgd import SgdTrainer

pytestmark = pytest.mark.skipif(not has_fsdp(), reason="this version of torch has no FSDP2 that would do")
KINDS = {
    "gradient_norms": partial(GradientNorms, depth=None),
    "weight_norms": WeightNorms,
    "update_norms": UpdateNorms,
    "activation_norms": ActivationNorms,
    "gradient_spikes": partial(GradientSpikes, factor=1.01, warmup=1),
    "unused_parameters": UnusedParameters,
    "nan_watch": NanWatch,
    "dead_units": partial(DeadUnits, dataset_key="test", max_batches=3),
    "export": partial(ExportModel, dataset_key="test"),
}


class Net(nn.Module):
    """Blocks whose rows do not divide, and a layer that is never used."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(64, 7)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(7, 10)
        self.spare = nn.Linear(3, 3)

    def forward(self, inputs):
        hidden = self.embed(inputs.flatten(1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


def run_of(strategy, folder, name, kinds):
    data = DataContainer({"train": Digits("train"), "test": Digits("test")}, 72, seed=3, world=strategy.world)
    with keyed(3, "model"):
        model = ModelBase(Net())
    options = {"schedule": constant, "loss": nn.CrossEntropyLoss(), "max_updates": 4, "accumulation_steps": 2}
    trainer = SgdTrainer(model, data, partial(AdamW, lr=0.01), strategy=strategy, device="cpu", **options)
    callbacks = {key: partial(kind, every_n_updates=2) for key, kind in kinds.items()}
    return build_run(trainer, PathProvider(folder, name), lambda given: build_callbacks(callbacks, given), seed=3)


def values(strategy, folder):
    """Return the last value of every metric."""
    run = run_of(strategy, folder, "run", KINDS)
    try:
        train(run)
    finally:
        run.checkpoint_writer.close()
        run.hooks.close()
        run.data.close()
    return {key: summary.last for key, summary in run.log_writer.summary.items()}


def on_rank(folder):
    world = connect({})
    try:
        return values(ShardedParallel(world), folder)
    finally:
        world.close()


def test_two_ranks_find_what_one_process_does(tmp_path):
    expected = values(ShardedParallel(), str(tmp_path / "alone"))
    assert {key.partition("/")[0] for key in expected} >= KINDS.keys() - {"nan_watch", "export"} | {"update_ratios"}
    assert expected["unused_parameters"] == 2 and "gradient_norms/blocks.1.0" in expected
    for found in on_ranks(2, on_rank, str(tmp_path / "two")):
        assert found == pytest.approx(expected, rel=1e-4)
    exports = [
        torch.export.load(tmp_path / name / "runs/run/artifacts/models/export/E0_U4_S288/data/model.pt2").module()
        for name in ("alone", "two")
    ]
    inputs = Digits("test").inputs[:7]
    torch.testing.assert_close(exports[1](inputs), exports[0](inputs), rtol=1e-4, atol=1e-5)


def test_a_noise_scale_of_parameters_that_are_spread_is_refused(tmp_path):
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ConfigError, match=r"no gradients of single parts; use strategy=ddp"):
            run_of(ShardedParallel(OneOf(0, 2)), str(tmp_path), "run", {"noise": GradientNoiseScale})
    finally:
        dist.destroy_process_group()
