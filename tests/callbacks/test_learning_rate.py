from functools import partial

import pytest
import torch

from callbacks.learning_rate import LearningRate
from ksuit_runner.schedule import linear

RATE = partial(LearningRate, every_n_updates=5)


def test_one_rate_has_one_key(new_run):
    rules = {"no_decay": {"match": ["*bias"], "weight_decay": 0.0}}
    run = new_run({"rate": RATE}, schedule=linear, parameter_rules=rules, max_updates=21).train()
    assert run.metrics() == {"learning_rate"}
    assert run.metric("learning_rate") == pytest.approx({5: 0.375, 10: 0.25, 15: 0.125, 20: 0.0})


def test_a_weight_decay_with_a_schedule_is_logged_beside_it(new_run):
    rules = {"no_decay": {"match": ["*bias"], "weight_decay": 0.0}}
    optimizer = partial(torch.optim.SGD, lr=0.5, weight_decay=0.1)
    options = {"parameter_rules": rules, "optimizer": optimizer, "max_updates": 11}
    run = new_run({"rate": RATE}, weight_decay_schedule=partial(linear, end_value=0.3), **options).train()
    assert run.metrics() == {"learning_rate", "weight_decay/default", "weight_decay/no_decay"}
    assert run.metric("weight_decay/default") == pytest.approx({5: 0.2, 10: 0.3})
    assert run.metric("weight_decay/no_decay") == {5: 0.0, 10: 0.0}


def test_rates_that_differ_keep_their_own_keys_also_where_they_meet(new_run):
    rules = {"slow": {"match": ["*bias"], "lr_factor": 0.1}}
    arguments = {"schedule": linear, "parameter_rules": rules, "max_updates": 21}
    optimizer = partial(torch.optim.SGD, lr=0.5)
    new_run({"rate": RATE}, stop_at=12, optimizer=optimizer, **arguments).train()
    run = new_run({"rate": RATE}, optimizer=optimizer, **arguments).train()
    assert run.metrics() == {"learning_rate/default", "learning_rate/slow"}
    assert run.metric("learning_rate/default") == pytest.approx({5: 0.375, 10: 0.25, 15: 0.125, 20: 0.0})
    assert run.metric("learning_rate/slow") == pytest.approx({5: 0.0375, 10: 0.025, 15: 0.0125, 20: 0.0})
