import logging
from functools import partial

import pytest

from callbacks.best_checkpoint import BestCheckpoint
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint.folders import read_tags
from ksuit_runner.errors import ConfigError
from ksuit_runner.periodic_callback import PeriodicCallback


class Says(PeriodicCallback):
    """Logs given values, one after the other."""

    def __init__(self, key, values, **kwargs):
        super().__init__(**kwargs)
        self.key = key
        self.values = values

    def _periodic_callback(self, update_counter):
        self.writer.add_scalar(self.key, self.values[update_counter.update // self.interval.every_n_updates - 1])


def says(key, *values):
    return partial(Says, key, values, every_n_updates=5)


class Asks(CallbackBase):
    """Remembers at which updates a checkpoint was asked for."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.updates = []

    def _after_log(self, update_counter, metrics):
        if self.checkpoint_writer.is_due(update_counter):
            self.updates.append(update_counter.update)


@pytest.mark.parametrize(
    ("key", "values", "asked"),
    [
        ("accuracy/test", (0.5, 0.7, 0.6, 0.7, 0.8), [5, 10, 25]),
        ("loss/test", (0.5, 0.7, 0.4, 0.4, float("nan")), [5, 15]),
        ("loss/test", (float("nan"), 0.7, 0.9, 0.8, 1.0), [10]),
    ],
)
def test_a_better_value_keeps_a_checkpoint(new_run, key, values, asked):
    callbacks = {"says": says(key, *values), "best": partial(BestCheckpoint, metric_key=key), "asks": Asks}
    run = new_run(callbacks, max_updates=25).train()
    assert run["asks"].updates == asked
    tags = read_tags(run.paths)
    assert tags == {"best": f"E{asked[-1] // 20}_U{asked[-1]}_S{run.run.counter.sample_at(asked[-1])}"}
    folders = {path.name for path in run.paths.checkpoints_dir.iterdir() if path.is_dir()}
    assert tags["best"] in folders


def test_a_resume_restores_the_best_value(new_run):
    values = (0.5, 0.9, 0.6, 0.7, 0.95)
    callbacks = {
        "says": says("accuracy/test", *values),
        "best": partial(BestCheckpoint, metric_key="accuracy/test", tag="top"),
        "asks": Asks,
    }
    new_run(callbacks, stop_at=12, max_updates=25).train()
    resumed = new_run(callbacks, max_updates=25)
    assert resumed["best"].best == 0.9
    assert resumed.train()["asks"].updates == [25]
    assert read_tags(resumed.paths) == {"top": "E1_U25_S1798"}


def test_the_best_value_of_another_metric_is_not_compared_with(new_run):
    def callbacks(key):
        return {"says": says(key, 1, 2, 3, 4, 5), "best": partial(BestCheckpoint, metric_key=key), "asks": Asks}

    new_run(callbacks("accuracy/test"), stop_at=12, max_updates=25).train()
    resumed = new_run(callbacks("loss/test"), max_updates=25).train()
    assert resumed["asks"].updates == [15]


def test_a_metric_without_a_better_direction_is_refused(new_run):
    with pytest.raises(ConfigError, match=r"metric_property_provider .*'learning_rate'"):
        new_run({"best": partial(BestCheckpoint, metric_key="learning_rate")})


def test_a_metric_that_was_never_logged_is_reported_at_the_end(new_run, caplog):
    callbacks = {"says": says("accuracy/test", 1.0), "best": partial(BestCheckpoint, metric_key="accuracy/tset")}
    with caplog.at_level(logging.WARNING, "ksuit_runner"):
        new_run(callbacks, max_updates=5).train()
    assert caplog.messages == [
        "callbacks.best.metric_key: 'accuracy/tset' was never logged. Did you mean 'accuracy/test'?"
    ]
