import logging
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW

from callbacks.loss_spike import LossSpike
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.errors import ConfigError, LossError
from ksuit_runner.trainer.sgd import SgdTrainer

WINDOW = 8


class Spiking(SgdTrainer):
    """Has a loss that is many times as large, or NaN, at some updates."""

    factors = dict.fromkeys((10, 11, 15), 50.0)

    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, model)
        factor = self.factors.get(self.counter.update + 1, 1.0) if model.training else 1.0
        return {"total": losses["total"] * factor}, outputs


class Failing(Spiking):
    factors = dict.fromkeys(Spiking.factors, float("nan"))


class Loss(CallbackBase):
    """Keeps the loss of each update that no rank has to read twice."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def _track_after_accumulation_step(self, update_counter, batch, losses, outputs):
        self.seen.append(losses["total"].item())


def spike(**arguments):
    return {"spike": partial(LossSpike, **{"window": WINDOW, "every_n_updates": 5, **arguments})}


@pytest.fixture
def spiking(new_run):
    def module():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))

    given = {"max_updates": 20, "trainer_class": Spiking, "optimizer": partial(AdamW, lr=1e-3)}
    return lambda *args, **kwargs: new_run(*args, module=module(), **{**given, **kwargs})


@pytest.mark.parametrize("parts", [1, 2])
def test_a_spike_is_skipped_like_a_loss_that_is_not_finite(spiking, parts, caplog):
    given = {"accumulation_steps": parts, "max_updates": 20}
    other = spiking({}, "nan", trainer_class=Failing, nan_loss="skip", **given).train()
    caplog.clear()
    run = spiking(spike(), **given).train()
    assert all(torch.equal(weight, other.weights[name]) for name, weight in run.weights.items())
    found, wanted = (each.run.trainer.optimizer.state_dict()["state"] for each in (run, other))
    assert all(torch.equal(value, wanted[i][name]) for i in found for name, value in found[i].items())
    assert run.metric("spike/skipped") == {5: 0, 10: 1, 15: 3, 20: 3}
    assert [line.split(" is ")[0] for line in caplog.messages] == [f"the loss of update {n}" for n in (10, 11, 15)]
    assert all(line.endswith("; it is skipped") for line in caplog.messages)


def test_mean_and_deviation_are_those_of_the_losses_before(spiking, caplog):
    run = spiking({**spike(window=9), "loss": Loss}, max_updates=10).train()
    losses = np.array(run["loss"].seen)
    assert f"is {losses[9]:.4g}, and was {losses[:9].mean():.4g} ± {losses[:9].std():.2g} before" in caplog.text
    state = run["spike"].state_dict()
    assert state["variance"] == pytest.approx(losses[:9].var()) and state["losses"] == 9


def test_later_losses_weigh_more(spiking):
    run = spiking({**spike(window=3, threshold=1e9), "loss": Loss}, max_updates=9).train()
    losses = np.array(run["loss"].seen)
    mean, variance = losses[:3].mean(), losses[:3].var()
    for loss in losses[3:]:  # West, 1979: weights of 2/3 and 1/3
        variance = 2 / 3 * (variance + 1 / 3 * (loss - mean) ** 2)
        mean += (loss - mean) / 3
    assert (run["spike"].state_dict()["mean"], run["spike"].state_dict()["variance"]) == pytest.approx((mean, variance))


def test_a_state_without_all_that_it_needs_is_not_filled_up(spiking):
    spiking(spike(), "old", stop_at=10).train()
    resumed = spiking(spike(), "old")
    state = resumed["spike"].state_dict()
    del state["losses"]
    with pytest.raises(KeyError, match="losses"):
        resumed["spike"].load_state_dict(state)
    assert resumed["spike"].state_dict()["losses"] == WINDOW


def test_a_resume_goes_on_in_the_middle_of_spikes(spiking):
    whole = spiking(spike()).train()
    spiking(spike(), "killed", stop_at=10).train()
    resumed = spiking(spike(), "killed").train()
    assert resumed["spike"].state_dict() == whole["spike"].state_dict()
    assert all(torch.equal(weight, whole.weights[name]) for name, weight in resumed.weights.items())


@pytest.mark.parametrize(
    ("arguments", "update", "message"),
    [
        ({"max_skips": 1}, 10, r"spike\.max_skips: the loss of update 11 .*, and the 1 before it were skipped"),
        ({"max_skips": 0}, 9, r"spike\.max_skips: the loss of update 10 is \S+, and was \S+ ± \S+ before\n"),
        ({"action": "fail"}, 9, r"callbacks\.spike: the loss of update 10 is"),
    ],
)
def test_it_ends_the_run_with_the_state_before(spiking, arguments, update, message):
    run = spiking(spike(**arguments))
    with pytest.raises(LossError, match=message):
        run.train()
    again = spiking(spike(max_skips=2))
    assert again.run.counter.update == update
    whole = spiking(spike(max_skips=2), "whole").train()
    assert all(torch.equal(weight, whole.weights[name]) for name, weight in again.train().weights.items())


def test_the_scale_of_float16_goes_on_after_a_skipped_update(spiking):
    run = spiking(spike(), precision="float16").train()
    other = spiking({}, "nan", precision="float16", trainer_class=Failing, nan_loss="skip").train()
    assert run["spike"].state_dict()["skipped"] == 3
    assert all(torch.equal(weight, other.weights[name]) for name, weight in run.weights.items())


def test_without_a_spike_nothing_changes(spiking, caplog):
    with caplog.at_level(logging.WARNING, "ksuit_runner"):
        run = spiking(spike(), trainer_class=SgdTrainer).train()
    alone = spiking({}, "alone", trainer_class=SgdTrainer).train()
    assert all(torch.equal(weight, alone.weights[name]) for name, weight in run.weights.items())
    assert not caplog.messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0}, "threshold: a number above 0 is needed"),
        ({"window": 1}, "window: a whole number of at least 2 is needed"),
        ({"max_skips": -1}, "max_skips: a whole number of at least 0 is needed"),
    ],
)
def test_bad_arguments_are_refused(new_run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        new_run(spike(**arguments))
