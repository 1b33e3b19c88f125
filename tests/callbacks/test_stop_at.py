import logging
import signal
from functools import partial

import pytest
import torch

from callbacks.stop_at import StopAt
from ksuit_runner.api import run
from ksuit_runner.errors import ConfigError
from ksuit_runner.schedule import linear


def stop_at(**arguments):
    return {"stop": partial(StopAt, **arguments)}


@pytest.mark.parametrize(
    ("arguments", "update"),
    [
        ({"update": 7}, 7),
        ({"epoch": 1}, 20),
        ({"sample": 145}, 3),  # of 72 each
        ({"sample": 144, "epoch": 1, "update": 9}, 2),
        ({"update": 9, "max_time": "1h"}, 9),
        ({"update": 99}, 30),
    ],
)
def test_a_run_is_finished_at_the_first_of_its_positions(new_run, arguments, update):
    ended = new_run(stop_at(**arguments), max_updates=30).train().run
    assert (ended.counter.update, ended.is_finished, ended.interruption.signal) == (update, True, None)


@pytest.mark.parametrize(("moved_to", "updates"), [(5, [7]), (7, [7]), (12, [7, 12]), (30, [7, 30])])
def test_a_run_continues_up_to_where_its_end_is_moved(new_run, moved_to, updates):
    ends = [new_run(stop_at(update=7), max_updates=30).train().run.counter.update]
    run = new_run(stop_at(update=moved_to), max_updates=30)
    run.run.counter.stopped = False  # as where the command line moves it
    ended = run.train().run
    assert ended.is_finished and sorted({*ends, ended.counter.update}) == updates


@pytest.mark.parametrize("position", [{"update": 7}, {"sample": 7 * 72}, {"epoch": 1, "update": 7}])
def test_a_run_that_was_interrupted_ends_at_the_same_update(new_run, position):
    new_run(stop_at(**position), "cut", max_updates=30, stop_at=5).train()
    ended = new_run(stop_at(**position), "cut", max_updates=30).train().run
    assert (ended.counter.update, ended.is_finished) == (7, True)


def test_nothing_of_it_is_called_before_the_position(new_run):
    run = new_run(stop_at(update=7, max_time="1h"), max_updates=30)
    called = []
    for hook in ("_periodic_callback", "_timed_callback", "_after_update"):
        own = getattr(run["stop"], hook)
        setattr(run["stop"], hook, lambda hook=hook, own=own, **given: (called.append(hook), own(**given)))
    run.train()
    assert called == ["_periodic_callback"]


def test_its_learning_rates_are_those_of_the_whole_length(new_run):
    given = {"max_updates": 40, "schedule": linear}
    whole = new_run({}, stop_at=10, **given).train()
    stopped = new_run(stop_at(update=10), "stopped", **given).train()
    assert stopped.run.trainer.learning_rates() == whole.run.trainer.learning_rates()
    assert stopped.run.trainer.learning_rates()["default"] == pytest.approx(0.5 * (1 - 10 / 39))
    assert all(torch.equal(whole.weights[name], weight) for name, weight in stopped.weights.items())


def test_a_run_that_has_time_for_one_update_at_a_start_ends_with_the_bits_of_one_start(new_run, caplog):
    whole = new_run({}, max_updates=4).train()
    with caplog.at_level(logging.INFO, "ksuit_runner"):
        for update in range(1, 4):
            ended = new_run(stop_at(max_time="0.000001s"), "short", max_updates=4).train().run
            assert (ended.counter.update, ended.is_finished, ended.interruption.signal) == (
                update,
                False,
                signal.SIGXCPU,
            )
    assert caplog.messages.count("the time of the run is up (0.000001s): it ends with a checkpoint") == 3
    resumed = new_run({}, "short", max_updates=4).train()
    assert resumed.run.is_finished
    assert all(torch.equal(whole.weights[name], weight) for name, weight in resumed.weights.items())


def test_jobs_whose_time_is_up_leave_the_others_alone_and_raise_no_signal(tmp_path):
    given = ("model=linear", "tracker=noop", "callbacks=[stop_at]", "callbacks.stop_at.max_time=0.001s")
    result = run([f"output_dir={tmp_path}", *given, "-m", "seed=0,1"])
    assert (result.status, [job.status for job in result.jobs]) == ("KILLED", ["killed"] * 2)
    assert run([f"output_dir={tmp_path}", "resume=last"]).status == "KILLED"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of epoch, update, sample, max_time is needed"),
        ({"update": 0}, "update: a whole number of at least 1 is needed, not 0"),
        ({"max_time": "2 hours"}, "max_time: '2 hours' is not a duration above 0, such as 90m or 1d 12h"),
        ({"max_time": ""}, "max_time"),
    ],
)
def test_what_never_ends_a_run_is_refused(new_run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        new_run(stop_at(**arguments))
