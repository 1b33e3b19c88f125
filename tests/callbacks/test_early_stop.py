import logging
from functools import partial

import pytest
from scripted_metric import ScriptedMetric

from callbacks.early_stop import EarlyStop
from ksuit_runner.errors import ConfigError

NAN = float("nan")


def callbacks(key, values, **arguments):
    return {"metric": partial(ScriptedMetric, key, values), "stop": partial(EarlyStop, metric_key=key, **arguments)}


@pytest.mark.parametrize(
    ("key", "values", "arguments", "end"),
    [
        ("accuracy/test", (1, 2, 2, 1, 3, 3, 3, 9, 9, 9), {"patience": 3}, 20),
        ("accuracy/test", (1, 2, 2, 1, 3, 3, 3, 9), {"patience": 2}, 8),
        ("loss/test", (5, 4, 4.5, 3, 9, 3, 1, 1), {"patience": 2}, 12),
        ("loss/test", (5, 4, 3.6, 3.0, 3.5, 2, 1, 0.9, 0, 0), {"patience": 2, "min_delta": 0.5}, 20),
        ("loss/test", (5, 4.6, 4.3, 4.0, 3.9, 2, 1, 1), {"patience": 1, "min_delta": 0.5}, 4),
        ("accuracy/test", (1, 2, NAN, NAN, 3, NAN, 4, 5), {"patience": 2}, 8),
        ("accuracy/test", (NAN, NAN, 1, 2, 3, 4, 5, 6), {"patience": 2}, 4),
        ("accuracy/test", (0.5, 0.7, 0.8, 0.9), {"good_enough": 0.8}, 6),
        ("loss/test", (5, 4, 3, 2), {"good_enough": 3.5}, 6),
        ("loss/test", (5, 6, 7.5, 2), {"diverged": 7}, 6),
        ("accuracy/test", (0.5, 0.1, 0.05, 0.9), {"diverged": 0.1}, 6),
        ("loss/test", (5, NAN, 3, 2), {"diverged": 7}, 4),
        ("loss/test", (NAN, float("inf"), 2, 2), {"stop_if_not_finite": True}, 2),
        ("loss/test", (5, float("-inf"), 2, 2), {"stop_if_not_finite": True}, 4),
        ("loss/test", (5, 5, 5, 5, 5, 5), {"patience": 1, "min_updates": 7}, 8),
        ("loss/test", (5, 5, 5, 5, 4, 4), {"patience": 1, "min_updates": 9}, 12),
        ("accuracy/test", (1,) * 20, {"good_enough": 0.5, "min_epochs": 1}, 20),
    ],
)
def test_it_stops_after_as_many_evaluations_without_a_better_value(new_run, key, values, arguments, end):
    run = new_run(callbacks(key, values, **arguments), max_updates=40 if "min_epochs" in arguments else 20).train()
    assert run.run.counter.update == end
    assert run.run.counter.is_finished


def test_it_says_why(new_run, caplog):
    with caplog.at_level(logging.INFO, "ksuit_runner"):
        new_run(callbacks("accuracy/test", (0.5, 0.4, 0.5), patience=2), max_updates=20).train()
    assert "training stops at update 6: accuracy/test has not improved on 0.5 in 2 evaluations" in caplog.messages


def test_it_says_which_threshold_was_passed(new_run, caplog):
    with caplog.at_level(logging.INFO, "ksuit_runner"):
        new_run(callbacks("loss/test", (0.5, 0.4), good_enough=0.45), max_updates=20).train()
        new_run(callbacks("loss/test", (0.5, 9.0), diverged=2.0), "other", max_updates=20).train()
    assert [line for line in caplog.messages if "stops" in line] == [
        "training stops at update 4: loss/test is 0.4, and 0.45 is good enough",
        "training stops at update 4: loss/test is 9, worse than 2",
    ]


def test_a_resume_restores_the_evaluations_since_the_best(new_run):
    given = callbacks("accuracy/test", (0.5, 0.4, 0.4, 0.4, 0.6, 0.6), patience=3)
    new_run(given, stop_at=5, max_updates=12).train()
    resumed = new_run(given, max_updates=12)
    assert (resumed["stop"].best, resumed["stop"].waited) == (0.5, 1)
    assert resumed.train().run.counter.update == 8


def test_the_waiting_for_another_metric_is_forgotten(new_run):
    new_run(callbacks("accuracy/test", (0.5, 0.4), patience=3), stop_at=5, max_updates=12).train()
    other = new_run(callbacks("loss/test", (0.5, 0.4), patience=3), max_updates=12)["stop"]
    assert (other.best, other.waited) == (None, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": 0}, "patience"),
        ({"patience": 1, "min_delta": -0.1}, "min_delta: a number of at least 0"),
        ({}, "one of patience, good_enough, diverged, stop_if_not_finite is needed"),
        ({"patience": 1, "min_epochs": -1}, "min_epochs: a whole number of at least 0"),
        ({"good_enough": 0.5, "diverged": 0.6}, "diverged: 0.6 is not worse than good_enough, which is 0.5"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(new_run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        new_run({"stop": partial(EarlyStop, metric_key="accuracy/test", **arguments)})


def test_a_metric_without_a_better_direction_is_refused(new_run):
    with pytest.raises(ConfigError, match="'gradient_norm'"):
        new_run({"stop": partial(EarlyStop, metric_key="gradient_norm", patience=1)})


def test_a_metric_that_was_never_logged_is_reported_at_the_end(new_run, caplog):
    with caplog.at_level(logging.WARNING, "ksuit_runner"):
        new_run({"stop": partial(EarlyStop, metric_key="accuracy/test", patience=1)}, max_updates=2).train()
    assert caplog.messages == ["callbacks.stop.metric_key: 'accuracy/test' was never logged. There are none."]
