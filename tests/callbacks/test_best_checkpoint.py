import logging
from functools import partial

import pytest

from callbacks.best_checkpoint import BestCheckpoint
from callbacks.early_stop import EarlyStop
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.checkpoint.folders import names, newest_tags, read_tags
from ksuit_runner.counter import Progress
from ksuit_runner.errors import ConfigError


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
    with pytest.raises(ConfigError, match=r"^callbacks.best.metric_key: .*'learning_rate'.* metric_property_provider"):
        new_run({"best": partial(BestCheckpoint, metric_key="learning_rate")})


def test_a_metric_that_was_never_logged_is_reported_at_the_end(new_run, caplog):
    callbacks = {"says": says("accuracy/test", 1.0), "best": partial(BestCheckpoint, metric_key="accuracy/tset")}
    with caplog.at_level(logging.WARNING, "ksuit_runner"):
        new_run(callbacks, max_updates=5).train()
    assert caplog.messages == [
        "callbacks.best.metric_key: 'accuracy/tset' was never logged. Did you mean 'accuracy/test'?"
    ]


def tags_of(new_run, values, run_id="tiny", stop_at=None, others=(), **given):
    """Return which updates the tags name, after a run that logs these values every 5 updates."""
    callbacks = {
        "says": says("accuracy/test", *values),
        "others": says("loss/test", *(others or [0.0] * len(values))),
        "best": partial(BestCheckpoint, metric_key="accuracy/test", **given),
    }
    length = 5 * len(values)
    if stop_at is not None:
        new_run(callbacks, run_id, stop_at=stop_at, max_updates=length).train()
    run = new_run(callbacks, run_id, max_updates=length).train()
    return {tag: Progress.parse(name).update for tag, name in read_tags(run.paths).items()}


@pytest.mark.parametrize("stop_at", [None, 12, 20])
def test_the_best_few_are_kept_in_their_order(new_run, stop_at):
    values = (0.5, 0.7, float("nan"), 0.6, 0.4, 0.9)
    assert tags_of(new_run, values, stop_at=stop_at, top_k=3) == {"best": 30, "best_2": 10, "best_3": 20}


def test_what_is_no_longer_among_the_best_is_removed(new_run):
    callbacks = {
        "says": says("accuracy/test", *(n / 10 for n in range(8))),
        "best": partial(BestCheckpoint, metric_key="accuracy/test", top_k=3),
    }
    run = new_run(callbacks, max_updates=40, checkpoint={"keep_last": 1}).train()
    assert [Progress.parse(name).update for name in names(run.paths)] == [40, 35, 30]
    assert newest_tags(run.paths) == read_tags(run.paths)  # what a machine without the list of tags would find


def test_a_value_has_to_be_better_by_enough(new_run):
    assert tags_of(new_run, (0.5, 0.55, 0.58, 0.65), min_delta=0.1) == {"best": 20}


def test_equal_values_are_told_apart_by_further_metrics(new_run):
    values, losses = (0.5, 0.7, 0.7, 0.7), (0.1, 0.4, 0.3, 0.35)
    assert tags_of(new_run, values, others=losses, tie_breakers=["loss/test"]) == {"best": 15}


@pytest.mark.parametrize("stop_at", [None, 17])
def test_each_patience_keeps_what_early_stopping_would_have_ended_with(new_run, stop_at):
    values = (0.5, 0.4, 0.6, 0.5, 0.5, 0.7)
    found = tags_of(new_run, values, stop_at=stop_at, patiences=[1, 2, 3])
    assert found == {"best": 30, "best_patience_1": 5, "best_patience_2": 15, "best_patience_3": 30}
    for patience, update in ((1, 10), (2, 25), (3, 30)):
        stop = partial(EarlyStop, metric_key="accuracy/test", patience=patience)
        callbacks = {"says": says("accuracy/test", *values), "stop": stop}
        assert new_run(callbacks, f"stop{patience}{stop_at}", max_updates=30).train().run.counter.update == update


def test_numbers_that_mean_nothing_are_refused(new_run):
    for given in ({"min_delta": -1.0}, {"top_k": 0}, {"patiences": [0]}):
        with pytest.raises(ConfigError, match="at least [01] is needed"):
            new_run({"best": partial(BestCheckpoint, metric_key="accuracy/test", **given)})
