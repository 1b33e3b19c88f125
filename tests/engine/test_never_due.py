"""Intervals and warm-ups that a run is too short for are named before training."""

from types import SimpleNamespace

import pytest

from ksuit_runner.counter import Interval, UpdateCounter
from ksuit_runner.engine.never_due import never_due

LENGTH = "the run has 6 updates, 3 in each epoch"
LONGER = "callbacks.own: its interval is longer than the run"
COSINE = "ksuit_runner.schedule.cosine"


@pytest.mark.parametrize(
    ("interval", "remark"),
    [
        (
            Interval(every_n_updates=7),
            f"callbacks.own: its interval is longer than the run: every_n_updates=7 is update 7, and {LENGTH}",
        ),
        (
            Interval(every_n_epochs=3),
            f"callbacks.own: its interval is longer than the run: every_n_epochs=3 is update 9, and {LENGTH}",
        ),
        (Interval(every_n_updates=6), None),
        (Interval(every_n_epochs=3, every_n_updates=5), None),
        (Interval(every_n_updates=7, at_end=True), None),
        (Interval(every_n_updates=7, at_start=True), None),
    ],
)
def test_an_interval_that_does_not_end_is_named(interval, remark):
    counter = UpdateCounter(9, 3, max_epochs=2)
    counter.update = 5  # as in a resume: what counts is the whole run
    callbacks = [SimpleNamespace(name=name, interval=interval) for name in ("own", "default")]
    config = {"callbacks": {"own": {}}, "optimizer": {}}
    assert list(never_due(callbacks, counter, config)) == [remark] * (remark is not None)
    assert list(never_due(callbacks, counter, config | {"callbacks": None})) == []


@pytest.mark.parametrize(("warmup", "updates"), [("2 epochs", 6), (8, 8), ("1 epoch", None), (0.5, None)])
@pytest.mark.parametrize("path", ["schedule", "optimizer.head.weight_decay_schedule"])
def test_a_warm_up_that_does_not_end_is_named(path, warmup, updates):
    *above, name = path.split(".")
    node = {name: {"_target_": COSINE, "warmup": warmup}}
    optimizer = {"head": {"_target_": "torch.optim.SGD", **node}} if above else {}
    config = {"callbacks": {}, "optimizer": optimizer} | ({} if above else node)
    found = list(never_due([], UpdateCounter(9, 3, max_epochs=2), config))
    remark = f"{path}.warmup: it does not end: {warmup} is {updates} updates, and {LENGTH}"
    assert found == ([] if updates is None else [remark])
