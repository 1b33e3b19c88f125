"""Which hooks are due: an agenda that skips intervals between two due updates says what one that asks them would."""

from types import SimpleNamespace

import pytest

from ksuit_runner.counter import Interval, UpdateCounter
from ksuit_runner.engine.agenda import Agenda


def agenda(counter, intervals):
    periodic = [
        SimpleNamespace(name=name, interval=Interval(**given), periodic_callback=name)
        for name, given in intervals.items()
    ]
    return Agenda(["update"], ["epoch"], periodic, counter)


INTERVALS = {
    "updates": {"every_n_updates": 5},
    "epochs": {"every_n_epochs": 2},
    "samples": {"every_n_samples": 33},
    "end": {"at_end": True},
    "start": {"at_start": True, "every_n_updates": 7},
}


@pytest.mark.parametrize("left_out", [*INTERVALS, None])
@pytest.mark.parametrize("drop_last", [True, False])
def test_every_update_is_followed_by_what_is_due_however_often_that_is_asked(left_out, drop_last):
    intervals = {name: given for name, given in INTERVALS.items() if name != left_out}
    counter = UpdateCounter(23, 4, drop_last, max_updates=41)
    kept = agenda(counter, intervals)
    seen = set()
    for update in range(1, counter.end_update + 1):
        counter.update = update
        due = kept.after_update()
        assert due == agenda(counter, intervals).after_update() == kept.after_update()
        assert due[0] == "update" and ("epoch" in due) is counter.is_full_epoch
        seen.update(due)
    assert seen == {"update", "epoch", *intervals}


def test_what_is_due_with_an_epoch_follows_its_hooks():
    counter = UpdateCounter(8, 4, max_epochs=4)
    counter.update = 4
    due = agenda(counter, {"epochs": {"every_n_epochs": 2}, "updates": {"every_n_updates": 4}}).after_update()
    assert due == ["update", "updates", "epoch", "epochs"]


def test_the_start_and_an_early_end_leave_out_what_was_called_anyway():
    counter = UpdateCounter(8, 4, max_epochs=4)
    both = agenda(counter, {"first": {"at_start": True}, "second": {"at_start": True, "at_end": True}})
    assert both.at_start() == ["first", "second"] and both.at_start({"first"}) == ["second"]
    counter.update = 3
    assert both.at_start() == [] and both.at_end() == ["second"]
    counter.update = counter.end_update
    assert both.after_update() == ["update", "second", "epoch"] and both.at_end() == []


def test_a_run_without_updates_does_everything_once():
    counter = UpdateCounter(8, 4, max_epochs=0)
    empty = agenda(counter, INTERVALS)
    assert empty.after_update() == [*INTERVALS] and empty.at_start() == empty.at_end() == []
