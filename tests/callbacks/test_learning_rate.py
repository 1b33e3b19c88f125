from functools import partial

import pytest
import torch

from callbacks.learning_rate import LearningRate
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.schedule import linear

RATE = partial(LearningRate, every_n_updates=5)


def test_one_rate_has_one_key(new_run):
    rules = {"no_decay": {"match": ["*bias"], "weight_decay": 0.0}}
    run = new_run({"rate": RATE}, schedule=linear, parameter_rules=rules, max_updates=21).train()
    assert run.metrics() == {"learning_rate"}
    assert run.metric("learning_rate") == pytest.approx({5: 0.4, 10: 0.275, 15: 0.15, 20: 0.025})


def test_a_weight_decay_with_a_schedule_is_logged_beside_it(new_run):
    rules = {"no_decay": {"match": ["*bias"], "weight_decay": 0.0}}
    optimizer = partial(torch.optim.SGD, lr=0.5, weight_decay=0.1)
    options = {"parameter_rules": rules, "optimizer": optimizer, "max_updates": 11}
    run = new_run({"rate": RATE}, weight_decay_schedule=partial(linear, end_value=0.3), **options).train()
    assert run.metrics() == {"learning_rate", "weight_decay/default", "weight_decay/no_decay"}
    assert run.metric("weight_decay/default") == pytest.approx({5: 0.18, 10: 0.28})
    assert run.metric("weight_decay/no_decay") == {5: 0.0, 10: 0.0}


def test_rates_that_differ_keep_their_own_keys_also_where_they_meet(new_run):
    rules = {"slow": {"match": ["*bias"], "lr_factor": 0.1}}
    arguments = {"schedule": linear, "parameter_rules": rules, "max_updates": 21}
    optimizer = partial(torch.optim.SGD, lr=0.5)
    new_run({"rate": RATE}, stop_at=12, optimizer=optimizer, **arguments).train()
    run = new_run({"rate": RATE}, optimizer=optimizer, **arguments).train()
    assert run.metrics() == {"learning_rate/default", "learning_rate/slow"}
    assert run.metric("learning_rate/default") == pytest.approx({5: 0.4, 10: 0.275, 15: 0.15, 20: 0.025})
    assert run.metric("learning_rate/slow") == pytest.approx({5: 0.04, 10: 0.0275, 15: 0.015, 20: 0.0025})


def test_what_an_update_has_used_is_known_after_a_resume_right_behind_it(new_run):
    class Interrupt(CallbackBase):
        def _track_after_update_step(self, update_counter):
            if update_counter.update == 5:
                raise OSError("no space")

    options = {"schedule": linear, "max_updates": 21}
    with pytest.raises(OSError):
        new_run({"fails": Interrupt, "rate": RATE}, **options).train()
    resumed = new_run({"rate": RATE}, strict=False, **options).train()
    assert resumed.metric("learning_rate") == pytest.approx({5: 0.4, 10: 0.275, 15: 0.15, 20: 0.025})


def test_a_constant_weight_decay_is_logged_if_asked_for(new_run):
    optimizer = partial(torch.optim.SGD, lr=0.5, weight_decay=0.1)
    run = new_run({"rate": partial(RATE, weight_decay=True)}, optimizer=optimizer, max_updates=5).train()
    assert run.metric("weight_decay") == {5: 0.1}
    run = new_run({"rate": partial(RATE, weight_decay=False)}, "b", weight_decay_schedule=linear, max_updates=5).train()
    assert run.metrics() == {"learning_rate"}
