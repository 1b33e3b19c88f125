"""The mode, buffers and parameters of a loss module are part of the run."""

from functools import partial

import by_hand
import pytest
import torch
from run_maker import points
from torch import nn

from callbacks.loss import Loss
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import CheckpointError, ConfigError, LossError
from ksuit_runner.record.origin import Origin


class Scaled(nn.Module):
    """Cross entropy in units of its running mean, at a temperature that is learned."""

    def __init__(self, fail_at=None, nan_at=None):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer("mean", torch.ones(()))
        self.calls, self.fail_at, self.nan_at = 0, fail_at, nan_at

    def forward(self, outputs, targets):
        loss = nn.functional.cross_entropy(outputs / self.temperature, targets)
        if self.training:
            self.calls += 1
            self.mean.mul_(0.9).add_(loss.detach() * 0.1)
            if self.calls == self.fail_at:
                raise RuntimeError("out of memory")
            if self.calls == self.nan_at:
                return loss * float("nan")
        return loss / self.mean


STATE = {"optimizer": partial(torch.optim.SGD, lr=0.5, momentum=0.9), "max_updates": 8}


def end(maker, run_id, **options):
    run = maker.run(run_id=run_id, **{**STATE, "loss": Scaled(), **options})
    train(run)
    return read_newest(maker.paths(run_id)).state["trainer"]


def test_its_parameters_are_trained_by_their_names(maker):
    rules = {"loss": {"match": ["loss.*"], "lr_factor": 0.5}}
    state = end(maker, "one", parameter_rules=rules)
    assert state["loss"]["temperature"] != 1.0
    assert "loss.temperature" in state["optimizer"]["parameters"]
    assert state["optimizer"]["groups"]["loss"]["initial_lr"] == 0.25


def test_two_parameters_with_the_same_name_are_refused(maker):
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_module("loss", Scaled())
    with pytest.raises(ConfigError, match="'loss.temperature'"):
        maker.trainer(model=model, loss=Scaled())


def test_its_state_survives_a_resume_and_an_update_that_fails(maker, bits):
    whole = end(maker, "whole")
    with pytest.raises(RuntimeError, match="out of memory"):
        end(maker, "cut", loss=Scaled(fail_at=5))
    assert bits(end(maker, "cut", resume=True)) == bits(whole)


def test_a_skipped_update_does_not_change_buffers(maker):
    run = maker.run(loss=Scaled(nan_at=1), nan_loss="skip", max_updates=2)
    run.counter.end_update = 1
    with pytest.raises(LossError, match="every update was skipped"):
        train(run)
    assert run.trainer.loss.mean == 1.0


def test_it_evaluates_in_evaluation_mode_and_evaluating_changes_nothing(maker, bits):
    plain = end(maker, "plain")
    loss = {"loss": (Loss, {"dataset_key": "test", "every_n_updates": 3})}
    assert bits(end(maker, "evaluated", callbacks=loss)) == bits(plain)


def test_a_fork_may_have_another_loss_and_a_resume_not(maker):
    first = maker.trainer(**STATE, loss=Scaled())
    by_hand.train(first, updates=1)
    state = first.state_dict()
    with pytest.raises(CheckpointError, match="'loss.temperature', which the model does not have"):
        maker.trainer(**STATE).load_state_dict(state)
    del state["loss"]
    maker.trainer(**STATE).load_state_dict(state, same_settings=False)


def test_a_loss_without_a_stored_state_keeps_its_own(maker):
    class Weighted(nn.CrossEntropyLoss):
        def __init__(self, weights):
            super().__init__(weight=torch.tensor(weights))

    first = maker.trainer(**STATE, loss=Weighted([1.0, 1.0, 1.0]))
    state = {key: value for key, value in first.state_dict().items() if key != "loss"}
    fork = maker.trainer(**STATE, loss=Weighted([1.0, 2.0, 3.0]))
    fork.load_state_dict(state, same_settings=False)
    assert fork.loss.weight.tolist() == [1.0, 2.0, 3.0]
    origins = [
        Origin("fork", "run00000", (place,)) for place in ("loss.weights.1", "loss", "lossy.weights", "model.loss")
    ]
    assert [origin.has_other_loss for origin in origins] == [True, True, False, False]


def test_what_is_logged_is_the_loss_of_evaluation_mode(maker):
    class Smooth(nn.Module):
        def forward(self, outputs, targets):
            return nn.functional.cross_entropy(outputs, targets) + 100.0 * self.training

    loss = {"loss": (Loss, {"dataset_key": "test", "every_n_updates": 4})}
    run = maker.run(loss, loss=Smooth(), max_updates=4)
    train(run)
    [loss] = [value for key, _, value in points(run) if key == "loss/test"]
    assert loss < 50
