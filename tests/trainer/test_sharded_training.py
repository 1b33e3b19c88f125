"""Training with parameters that are spread over two ranks: what a trainer can do, it does like one process."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW
from torch.testing._internal.distributed.fake_pg import FakeStore
from worlds import OneOf

from ksuit_runner.data.container import DataContainer
from ksuit_runner.distributed.connect import connect
from ksuit_runner.distributed.fsdp import ShardedParallel, has_fsdp
from ksuit_runner.distributed.pieces import is_sharded
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.engine.assembly import build_run
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import ConfigError
from ksuit_runner.keyed_random import keyed
from ksuit_runner.models.base import ModelBase
from ksuit_runner.paths import PathProvider
from ksuit_runner.schedule import constant
from ksuit_runner.trainer.optimizer_specs import OptimizerSpec
from ksuit_runner.trainer.sgd import SgdTrainer

pytestmark = pytest.mark.skipif(not has_fsdp(), reason="this version of torch has no FSDP2 that would do")
UPDATES = 6


class Points:
    """Points with classes; the last feature of one of them is infinite."""

    def __init__(self, infinite: int | None = None) -> None:
        generator = torch.Generator().manual_seed(5)
        self.inputs, self.targets = torch.randn(40, 6, generator=generator), torch.arange(40) % 3
        if infinite is not None:
            self.inputs[infinite, -1] = math.inf

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.2)) for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


class Scaled(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs * self.scale, targets)


class Counting(SgdTrainer):
    """Has a loss over samples, and one over what is of class 0, of which a part may have nothing."""

    def training_step(self, batch: Any, model: nn.Module) -> Any:
        inputs, targets = batch
        outputs = model(inputs)
        chosen = targets == 0
        of_class = nn.functional.cross_entropy(outputs, targets, reduction="none") * chosen
        losses = {"all": self.loss(outputs, targets), "zero": (of_class.sum() / chosen.sum(), chosen.sum())}
        return losses, outputs


class InTurns(SgdTrainer):
    def training_step(self, batch: Any, model: nn.Module, turn: str | None) -> Any:
        return super().training_step(batch, model)


EXACT = 2e-6
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "adamw": ({"optimizer": partial(AdamW, lr=1e-3), "clip_norm": 0.1}, 1e-5),
    "values": ({"clip_value": 0.01}, EXACT),
    "bfloat16": ({"precision": "bfloat16"}, 0.02),
    "float16": ({"precision": "float16", "clip_norm": 0.5}, 0.01),
    "thawing": ({"freeze": {"blocks": {"match": ["blocks.*"], "until_update": 3}}}, EXACT),
    "frozen": ({"freeze": ["embed.*"]}, EXACT),
    "loss": ({"loss": Scaled()}, EXACT),
    "checkpointed": ({"activation_checkpointing": ["blocks.{}"]}, EXACT),
    "skipped": ({"nan_loss": "skip", "infinite": 7}, EXACT),
    "counts": ({"trainer_class": Counting, "loss_weights": {"all": 1.0, "zero": 0.5}}, EXACT),
    "turns": (
        {
            "trainer_class": InTurns,
            "optimizer": {
                "head": OptimizerSpec(partial(SGD, lr=0.1), ["head.*"]),
                "rest": OptimizerSpec(partial(AdamW)),
            },
            "turns": ["head", "rest"],
        },
        1e-5,
    ),
}


def trainer_of(strategy: Strategy, settings: dict[str, Any]) -> SgdTrainer:
    defaults = {"optimizer": partial(SGD, lr=0.1, momentum=0.9), "loss": nn.CrossEntropyLoss(), "accumulation_steps": 4}
    given = {**defaults, **settings}
    trainer_class, datasets = given.pop("trainer_class", SgdTrainer), {"train": Points(given.pop("infinite", None))}
    data = DataContainer(datasets, 20, seed=3, world=strategy.world)
    with keyed(3, "model"):
        model = ModelBase(Net())
    built: SgdTrainer = trainer_class(
        model, data, schedule=constant, max_updates=UPDATES, device="cpu", strategy=strategy, **given
    )
    return built


def trained(strategy: Strategy, folder: str, name: str) -> dict[str, Tensor]:
    """Train a variant, and return the weights and buffers, whole."""
    trainer = trainer_of(strategy, VARIANTS[name][0])
    run = build_run(trainer, PathProvider(folder, name), lambda collaborators: {}, seed=3)
    try:
        train(run)
    finally:
        run.checkpoint_writer.close()
        run.data.close()
    tensors = {**trainer.model.tensors(), **{f"loss.{key}": value for key, value in trainer.loss.state_dict().items()}}
    return {key: (value.full_tensor() if is_sharded(value) else value).clone() for key, value in tensors.items()}


def on_rank(folder: str) -> dict[str, dict[str, Tensor]]:
    world = connect({})
    try:
        return {name: trained(ShardedParallel(world), folder, name) for name in VARIANTS}
    finally:
        world.close()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return on_ranks(2, on_rank, str(tmp_path_factory.mktemp("sharded")))


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_train_like_one_process(name, found, tmp_path):
    expected, tolerance = trained(Strategy(), str(tmp_path), name), VARIANTS[name][1]
    for key, value in found[0][name].items():
        assert torch.equal(value, found[1][name][key]), key
        torch.testing.assert_close(value, expected[key], rtol=0, atol=tolerance, msg=lambda text, key=key: key + text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": LBFGS}, "LBFGS evaluates the loss again, which strategy=fsdp does not: strategy=ddp"),
        ({"optimizer": partial(SGD, lr=0.1, fused=True)}, "torch has no fused kernel of SGD for strategy=fsdp"),
        ({"loss": Scaled(), "precision": "float16"}, "float16 does not fit strategy=fsdp .* Use bfloat16"),
        ({"accumulation_steps": 3}, "3 parts of a batch cannot be divided among 2 ranks"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_update(settings, message):
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ConfigError, match=message):
            trainer_of(ShardedParallel(OneOf(0, 2)), settings)
    finally:
        dist.destroy_process_group()
