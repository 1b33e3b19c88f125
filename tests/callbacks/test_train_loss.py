from functools import partial

import pytest
import torch

from callbacks.train_loss import TrainLoss
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.trainer.sgd import SgdTrainer


class Recorder(CallbackBase):
    """Keeps update, number of samples and losses of every accumulation step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps = []

    def _track_after_accumulation_step(self, update_counter, batch, losses, outputs):
        self.steps.append((update_counter.update, len(batch[0]), {name: loss.item() for name, loss in losses.items()}))

    def mean(self, updates, name="total"):
        chosen = [(size, losses[name]) for update, size, losses in self.steps if update in updates]
        return sum(size * loss for size, loss in chosen) / sum(size for size, _ in chosen)


class HalfPrecision(SgdTrainer):
    """Returns losses in a type that cannot count, and a second one."""

    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, model)
        return {"total": losses["total"].bfloat16(), "size": outputs.detach().square().mean()}, outputs


class Weighed(SgdTrainer):
    """Returns a parameter as a loss, which the step of the same update changes."""

    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, model)
        return {"total": losses["total"], "bias": [*model.parameters()][-1][0]}, outputs


# 1438 samples in batches of 72: the 20th of an epoch has 70. In three parts they have 23, 23 and 24 samples.
@pytest.mark.parametrize("parts", [1, 3])
def test_every_sample_since_the_last_log_counts_the_same(new_run, parts):
    callbacks = {"loss": partial(TrainLoss, every_n_updates=8), "recorder": Recorder}
    run = new_run(callbacks, accumulation_steps=parts, max_updates=30).train()
    assert len(run["recorder"].steps) == 30 * parts
    assert run.metrics() == {"loss/train"}
    wanted = {end: run["recorder"].mean(range(end - 8, end)) for end in (8, 16, 24)}
    assert run.metric("loss/train") == pytest.approx(wanted, rel=1e-5)


def test_other_losses_have_names_and_sums_keep_their_digits(new_run):
    callbacks = {"loss": partial(TrainLoss, every_n_epochs=1), "recorder": Recorder}
    run = new_run(callbacks, trainer_class=HalfPrecision, max_epochs=1).train()
    assert run.metrics() == {"loss/train", "loss_size/train"}
    assert run.metric("loss/train")[20] == pytest.approx(run["recorder"].mean(range(20)), rel=1e-5)
    assert run.metric("loss_size/train")[20] == pytest.approx(run["recorder"].mean(range(20), "size"), rel=1e-5)


def test_a_loss_has_the_value_that_it_had_before_the_step(new_run):
    callbacks = {"loss": partial(TrainLoss, every_n_updates=1), "recorder": Recorder}
    run = new_run(callbacks, trainer_class=Weighed, max_updates=3, accumulation_steps=2).train()
    wanted = {update + 1: losses["bias"] for update, _, losses in run["recorder"].steps}
    assert len(set(wanted.values())) == 3 and run.metric("loss_bias/train") == pytest.approx(wanted)


def test_a_subclass_of_before_that_nothing_would_call_is_refused():
    with pytest.raises(TypeError, match=r"'_accumulate', which nothing calls: derive from OnlineCallback"):
        type("Mine", (TrainLoss,), {"_accumulate": lambda self, *arguments: None})


@pytest.mark.parametrize("stop_at", [13, 14, 28])
def test_a_resumed_run_logs_the_same_values(new_run, stop_at):
    callbacks = {"loss": partial(TrainLoss, every_n_updates=7)}
    whole = new_run(callbacks, run_id="whole").train()
    new_run(callbacks, run_id="cut", stop_at=stop_at).train()
    resumed = new_run(callbacks, run_id="cut").train()
    assert list(whole.metric("loss/train")) == list(range(7, 60, 7))
    assert whole.metric("loss/train") == resumed.metric("loss/train")
    assert whole["loss"].state_dict() == resumed["loss"].state_dict()
    assert whole["loss"]._sums.take().totals["total",].count == 3 * 72 + 70


def test_sums_that_were_stored_with_one_count_for_all_losses_are_restored(new_run):
    callback = new_run({"loss": partial(TrainLoss, every_n_updates=7)})["loss"]
    callback.load_state_dict({"sums": {"total": torch.tensor(6.0), "size": torch.tensor(9.0)}, "count": 3})
    totals = callback._sums.take().totals
    assert {name: total.mean for (name,), total in totals.items()} == {"total": 2.0, "size": 3.0}


def test_logging_changes_nothing_about_training(new_run):
    plain = new_run({}, run_id="plain").train()
    logged = new_run({"loss": partial(TrainLoss, every_n_updates=3)}, run_id="logged").train()
    assert torch.equal(plain.model.module.layer.weight, logged.model.module.layer.weight)


def test_the_mean_of_each_epoch_is_logged_beside_that_of_the_interval(new_run):
    callbacks = {"loss": partial(TrainLoss, every_n_updates=8, per_epoch=True), "recorder": Recorder}
    whole = new_run(callbacks, run_id="whole", accumulation_steps=3, max_updates=45).train()
    wanted = {end: whole["recorder"].mean(range(end - 20, end)) for end in (20, 40)}
    assert whole.metric("loss/train/epoch") == pytest.approx(wanted, rel=1e-5)
    assert list(whole.metric("loss/train")) == [8, 16, 24, 32, 40]
    new_run(callbacks, run_id="cut", accumulation_steps=3, max_updates=45, stop_at=30).train()
    resumed = new_run(callbacks, run_id="cut", accumulation_steps=3, max_updates=45).train()
    assert all(resumed.metric(key) == whole.metric(key) for key in ("loss/train", "loss/train/epoch"))
