"""A rehearsal of evaluations before the first update finds mistakes, and leaves no trace."""

from functools import partial

import pytest
import torch
from torch import nn

from callbacks.accuracy import Accuracy
from callbacks.ema import Ema
from callbacks.loss import Loss
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.errors import ConfigError
from ksuit_runner.testing import tiny_run

NEVER = {"every_n_epochs": 2, "at_end": False}  # not in the updates of these runs


class Counting(nn.Module):
    """Has a buffer that every forward pass changes, and draws in every one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x.flatten(1)) + torch.rand(()) / 100


class Seen(DatasetCallback):
    """Keeps what it sees, with or without a promise that all it finds is in ``gathered``."""

    def __init__(self, promises, **kwargs):
        super().__init__(**kwargs)
        self.shares_work, self.seen = promises, []

    def _process_batch(self, batch, models):
        self.seen.append((len(batch[0]), sorted(models)))
        self.gathered.add("count", len(batch[0]))

    def _process_results(self, update_counter):
        self.writer.add_scalar(f"count/{self.name}", self.gathered.totals["count"].sum)


def test_what_evaluations_refuse_is_raised_before_the_first_update(tmp_path):
    run = tiny_run(tmp_path, {"accuracy": partial(Accuracy, dataset_key="test", topk=[11], **NEVER)}, max_updates=3)
    with pytest.raises(ConfigError, match=r"callbacks\.accuracy\.topk: 11 is more than the 10 classes"):
        run.train()
    assert not run.run.has_begun and not list(run.paths.checkpoints_dir.glob("E*")) and not run.metrics()


def test_it_leaves_no_trace_and_takes_place_once(tmp_path, bits):
    callbacks = {
        "ema": Ema,
        "accuracy": partial(Accuracy, dataset_key="test", **NEVER),
        "loss": partial(Loss, dataset_key="test", batch_size=7, **NEVER),
        "seen": partial(Seen, True, dataset_key="test", at_start=True),
        "other": partial(Seen, False, dataset_key="test"),
    }
    given = {"module": Counting(), "max_updates": 4}
    state = {name: tensor.clone() for name, tensor in given["module"].state_dict().items()}
    rehearsed = tiny_run(tmp_path, callbacks, "rehearsed", stop_at=2, **given).train()
    assert rehearsed["seen"].seen[0] == (100, [""]) and rehearsed["seen"].seen[1] == (100, ["", "ema"])
    assert rehearsed["other"].seen == []
    given["module"].load_state_dict(state)
    resumed = tiny_run(tmp_path, callbacks, "rehearsed", **given).train()
    batches = -(-len(resumed.run.data.datasets["test"]) // 100)
    assert len(resumed["seen"].seen) == batches == len(resumed["other"].seen)  # at the end only
    assert resumed.metric("count/seen") == {0: 359.0, 4: 359.0}
    given["module"].load_state_dict(state)
    alone = tiny_run(tmp_path, {}, "alone", **given).train()
    resumed_weights = {**resumed.weights, "calls": alone.weights["calls"]}  # an evaluation does count
    assert bits(resumed_weights) == bits(alone.weights)
    assert rehearsed.run.counter.update == 2


class Late(CallbackBase):
    """Finds its config wrong at the end."""

    def _after_training(self, update_counter):
        raise ConfigError("this cannot be", path="callbacks.late")


def test_what_is_found_wrong_after_an_evaluation_refuses_no_run(tmp_path):
    callbacks = {"seen": partial(Seen, False, dataset_key="test", every_n_epochs=1), "late": Late}
    run = tiny_run(tmp_path, callbacks, max_updates=0)
    with pytest.raises(ConfigError, match="this cannot be"):
        run.train()
    assert run["seen"].seen and run.run.has_begun


class Filling(nn.Module):
    """Fills a buffer at the first call, and registers another one that is as long as the longest batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.is_filled, self.longest = nn.Linear(64, 10), False, 0
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x):
        x = x.flatten(1)
        if not self.is_filled:
            self.mean.copy_(x.mean(0))
            self.is_filled, self.noted = True, len(x)
        if len(x) > self.longest:
            self.longest = len(x)
            self.register_buffer("table", torch.ones(len(x), 1), persistent=False)
        return self.layer(x - self.mean) * self.table[: len(x)]


def test_what_modules_note_of_their_buffers_is_undone_with_these(tmp_path):
    loss = {"loss": partial(Loss, dataset_key="test", **NEVER)}
    alone, rehearsed = (
        tiny_run(tmp_path, callbacks, name, module=Filling(), max_updates=2).train()
        for name, callbacks in (("alone", {}), ("rehearsed", loss))
    )
    assert torch.equal(alone.weights["mean"], rehearsed.weights["mean"]) and alone.weights["mean"].any()
