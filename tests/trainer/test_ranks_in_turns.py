"""What is computed depends on the number of parts of a batch, and not on how many ranks compute them."""

from contextlib import nullcontext
from functools import partial

import by_hand
import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.optim import LBFGS, SGD
from worlds import Adding, OneOf, in_turns

from callbacks.loss_spike import LossSpike
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.data.container import DataContainer
from ksuit_runner.distributed import ddp
from ksuit_runner.distributed.connect import connect
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.distributed.world import World
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import ConfigError, LossError
from ksuit_runner.models.base import ModelBase
from ksuit_runner.schedule import constant
from ksuit_runner.trainer.sgd import SgdTrainer

SIZES = (1, 2, 4)


class Norm(nn.BatchNorm1d):
    """Takes a single row, too, with which torch's is an error."""

    def forward(self, inputs):
        return super().forward(torch.cat([inputs, inputs + 1]))[: len(inputs)]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Norm(8), nn.Dropout(0.3), nn.Linear(8, 3), Buffers())


class Buffers(nn.Module):
    """Has buffers of all kinds, some of which no forward pass changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("smallest", torch.full((3,), torch.inf))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("has_begun", torch.tensor(False))
        self.register_buffer("constant", torch.rand(3, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("large", torch.zeros(300, 300))
        self.register_buffer("table", torch.full((300, 300), -torch.inf))

    def forward(self, inputs):
        if self.training:
            with torch.no_grad():
                self.smallest.copy_(torch.minimum(self.smallest, inputs.min(0).values))
                self.seen += len(inputs)
                self.has_begun.fill_(True)
                self.large[0, :3] += inputs.mean(0)
        return inputs + 0 * self.constant


def trained(maker, size, error=None, **options):
    """Train on so many ranks in turns, and return their runs."""
    runs = {}
    defaults = {"accumulation_steps": 4, "max_updates": 5, "optimizer": partial(SGD, lr=0.3, momentum=0.9)}
    given = {"schedule": constant, "batch_size": 9, "drop_last": False, **defaults, **options}

    def rank(world):
        strategy = Adding(world) if size > 1 else Strategy()
        run = runs[world.rank] = maker.run(
            run_id=f"{size}-{world.rank}", model=make_model(), strategy=strategy, **given
        )
        run.data.world = world
        train(run)

    with pytest.raises(error) if error else nullcontext():
        in_turns(size, rank)
    return [runs[rank] for rank in range(size)]


def same(maker, bits, **options):
    """Train on 1, 2 and 4 ranks, and check that all end with the same bits; return the run of a single process."""
    runs = [trained(maker, size, **options) for size in SIZES]
    [alone] = runs[0]
    for ranks in runs[1:]:
        for run in ranks:
            assert bits(run.trainer.model.tensors()) == bits(alone.trainer.model.tensors())
            states = [{**item.trainer.state_dict(), "data": {}} for item in (run, alone)]
            assert bits(states[0]) == bits(states[1])
            assert run.trainer.loss_check.skips == alone.trainer.loss_check.skips
    return alone


class Tokens(SgdTrainer):
    """Has losses with counts of its own, one of which is a mean over nothing in some parts."""

    def training_step(self, batch, model):
        outputs, targets = model(batch[0]), batch[1]
        each = nn.functional.cross_entropy(outputs, targets, reduction="none")
        second = targets == 2
        return {
            "first": ((each * (targets < 2)).sum() / (targets < 2).sum(), (targets < 2).sum()),
            "second": ((each * second).sum() / second.sum(), int(second.sum())),
            "size": outputs.square().mean(),
        }, outputs


CASES = {
    "plain": {},
    "clipped": {"clip_norm": 0.1},
    "weighed": {"loss": nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.7, 0.9]), ignore_index=2)},
    "sums": {"loss": nn.CrossEntropyLoss(reduction="sum"), "optimizer": partial(SGD, lr=0.01)},
    "counts": {"trainer_class": Tokens, "loss_weights": {"first": 0.5, "second": 2.0, "size": 0.1}},
    "small": {"batch_size": 3, "accumulation_steps": 8},
    "odd": {"batch_size": 7, "accumulation_steps": 12},
    "search": {"optimizer": partial(LBFGS, lr=0.5, max_iter=4), "max_updates": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_ends_with_the_same_bits(maker, bits, case):
    run = same(maker, bits, **CASES[case])
    assert run.counter.update == CASES[case].get("max_updates", 5)
    buffers = run.trainer.model.module[4]
    left_out = 3 if case == "weighed" else 0  # samples of parts without any target
    assert buffers.seen == run.counter.sample - left_out and buffers.has_begun
    assert torch.equal(buffers.constant, Buffers().constant) and torch.equal(buffers.table, Buffers().table)
    assert torch.isfinite(buffers.smallest).all() and buffers.large[0, :3].abs().min() > 0
    assert run.trainer.model.module[1].num_batches_tracked == run.counter.update


def test_all_ranks_skip_an_update_that_a_callback_skips(maker, bits):
    spike = {"spike": (LossSpike, {"threshold": 1e-6, "window": 2, "every_n_updates": 1})}
    run = same(maker, bits, callbacks=spike, max_updates=9, optimizer=partial(SGD, lr=3.0))
    skipped = run.hooks.callbacks["spike"].state_dict()["skipped"]
    assert 0 < skipped == 9 - run.trainer.model.module[1].num_batches_tracked


class Broken(SgdTrainer):
    """Has a loss that is not finite in one part of the second update."""

    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, model)
        if model.training and self.counter.update == 1 and self.counter.accumulation_step == 2:
            losses["total"] = losses["total"] * torch.inf
        return losses, outputs


class Tracks(CallbackBase):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def _track_after_accumulation_step(self, update_counter, batch, losses, outputs):
        self.seen.append((update_counter.update, update_counter.accumulation_step))


def test_a_part_that_is_not_finite_is_left_out_and_all_ranks_skip_the_update(maker, bits):
    run = same(maker, bits, trainer_class=Broken, nan_loss="skip", callbacks={"tracks": (Tracks, {})})
    seen = run.hooks.callbacks["tracks"].seen
    assert [step for update, step in seen if update == 1] == [0, 1, 3]
    assert run.trainer.model.module[4].seen == run.counter.sample - 9


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_fail_with_the_loss_of_one_of_them(maker, size):
    runs = trained(maker, size, trainer_class=Broken, error=LossError)
    assert {run.counter.update for run in runs} == {1}


class Logs(SgdTrainer):
    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, model)
        if self.counter.update % 2 and self.counter.accumulation_step != 1:
            self.writer.add_scalar("norm", outputs.norm())
            self.writer.add_scalar("rows", len(outputs))
        return losses, outputs


def test_what_a_training_step_logs_is_the_mean_over_the_parts_of_all_ranks(maker):
    found = []
    for size in SIZES:
        for run in trained(maker, size, trainer_class=Logs):
            found.append({key: run.log_writer.summary[key].last for key in ("norm", "rows")})
    assert all(values == found[0] for values in found) and 2 < found[0]["rows"] < 3


def test_parts_have_to_be_divided_among_the_ranks(maker):
    with pytest.raises(ConfigError, match="accumulation_steps: 3 parts of a batch cannot be divided among 2 ranks"):
        maker.trainer(strategy=Adding(OneOf(0, 2)), accumulation_steps=3)


class Points:
    """Points of three classes, with noise."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.randn(4) + index % 3, torch.tensor(index % 3)


def of_rank(size):
    """Train some cases on this rank of so many, without hooks, and return what they end with."""
    world = connect({}) if size > 1 else World()
    ddp._SMALL_BYTES = 2500  # some cases take one exchange, and those with more slots take buckets
    try:
        return {case: of_case(world, **CASES[case]) for case in ("weighed", "counts", "odd")}
    finally:
        world.close()


def of_case(world, batch_size=9, trainer_class=SgdTrainer, **options):
    data = DataContainer({"train": Points()}, batch_size, seed=3, drop_last=False, world=world)
    given = {"loss": nn.CrossEntropyLoss(), "optimizer": partial(SGD, lr=0.3), "accumulation_steps": 4, **options}
    strategy = ddp.DataParallel(world, bucket_mb=1e-3)
    trainer = trainer_class(
        ModelBase(make_model()), data, schedule=constant, strategy=strategy, **{"max_updates": 4, **given}
    )
    by_hand.train(trainer)
    return trainer.model.tensors(), trainer.state_dict()


def test_real_ranks_end_with_the_bits_of_one_process(bits):
    alone = of_rank(1)
    for size in (2, 4):
        for rank in on_ranks(size, of_rank, size):
            for case, found in rank.items():
                assert bits(found) == bits(alone[case]), (size, case)
