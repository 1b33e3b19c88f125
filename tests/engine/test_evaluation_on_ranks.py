"""Evaluations by several ranks find what one process finds, bit for bit, whether a callback knows of ranks or not."""

from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from torch import nn

from callbacks.accuracy import Accuracy
from callbacks.ema import Ema
from callbacks.loss import Loss
from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.data.container import DataContainer
from ksuit_runner.distributed.connect import connect
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.distributed.world import World
from ksuit_runner.keyed_random import seed_all
from ksuit_runner.models.base import ModelBase
from ksuit_runner.schedule import constant
from ksuit_runner.testing import tiny_run
from ksuit_runner.trainer import evaluation_pass
from ksuit_runner.trainer.sgd import SgdTrainer

EVERY = {"every_n_updates": 1}


class Points:
    """Points with noise, keyed by their batch."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(4, generator=generator) + torch.rand(4), torch.tensor(index % 3)


class Stream:
    """The same as a stream."""

    def __iter__(self):
        points = Points()
        return (points[index] for index in range(23))


class Counting(nn.Module):
    """Draws, and counts its forward passes."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 3), 0

    def forward(self, inputs):
        self.calls += 1
        return self.layer(inputs) + 0.1 * torch.randn(len(inputs), 3)


class Unaware(DatasetCallback):
    """Knows nothing of ranks: its result depends on all batches, their order, and what is drawn for them."""

    def _process_batch(self, batch, models):
        self.seen = [*getattr(self, "seen", []), (self.trainer.predict(batch[0]) * torch.rand(())).sum().item()]

    def _process_results(self, update_counter):
        value = sum(seen * 1.1**number for number, seen in enumerate(self.seen))
        self.writer.add_scalar(self.metric_key(f"unaware_{self.name}", ""), value + torch.rand(()).item())
        self.seen = []


class Spread(DatasetCallback):
    """Needs the scores of all samples."""

    shares_work = True

    def _process_batch(self, batch, models):
        for weights, model in models.items():
            self.gathered.add_rows(weights, self.trainer.predict(batch[0], model))

    def _process_results(self, update_counter):
        for weights, scores in self.gathered.rows.items():
            value = (scores.diff(dim=0) * torch.linspace(0, 1, len(scores) - 1).unsqueeze(1)).sum()
            self.writer.add_scalar(self.metric_key(f"spread_{self.name}", weights), value)


class Inherits(Accuracy):
    """Keeps something of its own, of which its class says nothing: it sees all batches."""

    def _process_batch(self, batch, models):
        super()._process_batch(batch, models)
        self.batches = getattr(self, "batches", 0) + 1

    def _process_results(self, update_counter):
        self.writer.add_scalar("batches", self.batches)
        self.batches = 0


class InStep(Strategy):
    is_sharded = True


class InOrder(SgdTrainer):
    """Its outputs depend on the batches before."""

    evaluates_in_order = True

    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, model)
        self.carried = 0.5 * getattr(self, "carried", 0.0) + outputs.mean().item()
        return {"total": losses["total"] + self.carried}, outputs


AWARE = {
    "accuracy": partial(Accuracy, topk=(1, 2)),
    "loss": Loss,
    "spread": Spread,
    "some": partial(Spread, max_batches=3),
}
MIXED = {
    **AWARE,
    "unaware": Unaware,
    "few": partial(Unaware, max_batches=2),
    "inherits": Inherits,
}


def evaluated(folder, world, callbacks, strategy=Strategy, batch_size=4, kind=SgdTrainer):
    """Return what is logged at the start and after an update, and how many batches the model has computed there."""
    makers = {name: partial(make, dataset_key=key, at_start=True, **EVERY) for name, (make, key) in callbacks.items()}
    datasets = {"train": Points(), "test": Points(), "stream": Stream()}
    data = DataContainer(datasets, 8, 7, eval_batch_size=batch_size, world=world)
    seed_all(0)
    model = Counting()
    trainer = kind(
        ModelBase(model),
        data,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        schedule=constant,
        loss=nn.CrossEntropyLoss(),
        max_updates=2,
        accumulation_steps=2,
        strategy=strategy(world),
        device="cpu",
    )
    run = tiny_run(folder, {"ema": Ema, **makers}, trainer=trainer).run
    data.open(run.counter, run.hooks.evaluations(), in_step=strategy.is_sharded)
    metrics, calls = [], model.calls
    with torch.no_grad():
        run.hooks.fire_round(run.hooks.agenda.at_start(), update_counter=run.counter)
        metrics.append(run.log_writer.flush())
        data.next_training_batch()
        run.counter.update = 1
        run.hooks.fire_round(run.hooks.agenda.after_update(), update_counter=run.counter)
        metrics.append(run.log_writer.flush())
    calls = model.calls - calls
    run.checkpoint_writer.close()
    data.close()
    return metrics, calls


CASES = {
    "aware": ({name: (make, "test") for name, make in AWARE.items()}, {}),
    "mixed": ({name: (make, "test") for name, make in MIXED.items()}, {}),
    "few": ({name: (make, "test") for name, make in MIXED.items()}, {"batch_size": 20}),
    "fewest": ({name: (make, "test") for name, make in AWARE.items()}, {"batch_size": 23}),
    "in order": ({"loss": (Loss, "test"), "accuracy": (Accuracy, "test")}, {"kind": InOrder}),
    "stream": ({name: (make, "stream") for name, make in MIXED.items()}, {}),
}


def on_rank(folder):
    torch.use_deterministic_algorithms(True)
    world = connect({}, 20.0)
    found = {}
    for strategy in (Strategy, InStep):
        if strategy is InStep:  # the last batches of ranks may have other sizes, which must not decide what is shared
            evaluation_pass.MOST_BYTES = 0
        for name, (callbacks, options) in CASES.items():
            place = Path(folder, f"{strategy.__name__}-{name}-{world.rank}")
            found[strategy.__name__, name] = evaluated(place, world, callbacks, strategy, **options)
    world.close()
    return found


def test_the_metrics_are_those_of_one_process(tmp_path):
    torch.use_deterministic_algorithms(True)
    whole = {name: evaluated(tmp_path / name, World(), given, **options) for name, (given, options) in CASES.items()}
    torch.use_deterministic_algorithms(False)
    ranks = on_ranks(2, on_rank, str(tmp_path))
    for found in ranks:
        for (_, name), (metrics, _) in found.items():
            assert metrics == whole[name][0], name
    # Each evaluation computes 6 batches for accuracy and loss, 6 and 3 for the others; ranks share them.
    calls = [{place: number for place, (_, number) in found.items()} for found in ranks]
    assert whole["aware"][1] == 2 * (6 + 6 + 3)
    assert [found["Strategy", "aware"] for found in calls] == [2 * (3 + 3 + 2), 2 * (3 + 3 + 1)]
    assert [found["Strategy", "fewest"] for found in calls] == [2 * 3, 0]
    in_step = [{place: number for place, number in found.items() if place[0] == "InStep"} for found in calls]
    assert in_step[0] == in_step[1] and in_step[0]["InStep", "aware"] == 2 * (3 + 3 + 2)
    assert in_step[0]["InStep", "fewest"] == 2 * 3


def test_an_error_of_ranks_in_step_ends_the_pass_at_once(tmp_path):
    class Broken(Unaware):
        def _process_batch(self, batch, models):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        evaluated(tmp_path, World(), {"first": (Unaware, "test"), "broken": (Broken, "test")}, InStep)
    assert "raised while callback 'broken' read a batch" in raised.value.__notes__
