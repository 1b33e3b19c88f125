import logging
import sys
from functools import partial
from importlib.util import find_spec

import pytest
from scripted_metric import ScriptedMetric
from worlds import in_threads

from callbacks.prune import Prune
from ksuit_runner.errors import ConfigError, StopTraining
from ksuit_runner.paths import PathProvider, SweepPaths
from ksuit_runner.sweep.optuna_study import PRUNED_AT, open_study

pytestmark = pytest.mark.skipif(
    find_spec("optuna") is None, reason="optuna is not installed: pip install 'ksuit_runner[optuna]'"
)
NAN = float("nan")
ACCURACY, LOSS = "accuracy/test", "loss/test"
PAST = {2: 0.4, 4: 0.6, 6: 0.8}  # what a finished trial has had, by update


class Search:
    """A study with finished trials, and one that is to be watched."""

    def __init__(self, folder, past, direction="higher"):
        paths = SweepPaths(folder, "sweep")
        paths.sweep_dir.mkdir(parents=True)
        self.study = open_study(paths, direction)
        for values in past:
            trial = self.ask()
            for update, value in values.items():
                trial.report(value, update)
            self.study.tell(trial, list(values.values())[-1])
        self.number = self.ask().number

    def ask(self):
        trial = self.study.ask()
        trial.suggest_float("lr", 0, 1)
        return trial

    @property
    def trial(self):
        return self.study.get_trials()[self.number]

    def callbacks(self, folder, key, values, **arguments):
        given = {"min_trials": 1, "study": "sweep", "trial": self.number, **arguments}
        prune = partial(Prune, path_provider=PathProvider(folder, "tiny"), metric_key=key, **given)
        return {"metric": partial(ScriptedMetric, key, values), "prune": prune}


@pytest.fixture
def search(tmp_path):
    return partial(Search, tmp_path)


@pytest.mark.parametrize(
    ("key", "values", "arguments", "end"),
    [
        (ACCURACY, (0.5, 0.7, 0.9), {}, 6),
        (ACCURACY, (0.4, 0.6, 0.8), {}, 6),  # as good as the median
        (ACCURACY, (0.3, 0.7, 0.9), {}, 2),
        (ACCURACY, (0.5, 0.5, 0.9), {}, 4),
        (ACCURACY, (0.7, 0.1, 0.9), {}, 6),  # it has been better than that
        (ACCURACY, (0.3, 0.5, 0.9), {"min_updates": 5}, 6),
        (ACCURACY, (0.3, 0.5, 0.9), {"min_updates": 4}, 4),
        (ACCURACY, (0.3, 0.5, 0.7), {"min_trials": 3}, 2),
        (ACCURACY, (0.3, 0.5, 0.7), {"min_trials": 4}, 6),
        (ACCURACY, (NAN, 0.7, 0.9), {}, 2),
        (LOSS, (0.3, 0.5, 0.7), {}, 6),
        (LOSS, (0.3, 0.7, 0.1), {}, 6),
        (LOSS, (0.5, 0.3, 0.1), {}, 2),
    ],
)
def test_a_trial_ends_when_it_is_worse_than_the_median(search, new_run, tmp_path, key, values, arguments, end):
    worse, better = ({update: value + step for update, value in PAST.items()} for step in (-0.3, 0.3))
    watched = search([worse, PAST, better], "higher" if key == ACCURACY else "lower")
    run = new_run(watched.callbacks(tmp_path, key, values, **arguments), max_updates=6).train()
    assert run.run.counter.update == end and run.run.counter.is_finished
    reported = {update: value for update, value in zip(PAST, values, strict=True) if update <= end}
    assert watched.trial.intermediate_values == pytest.approx(reported, nan_ok=True)
    is_ended = watched.trial.user_attrs == {PRUNED_AT: end}
    assert is_ended or watched.trial.user_attrs == {}
    assert is_ended == (end < 6)
    assert watched.trial.state.name == "RUNNING"  # the search sets how it ended


def test_it_says_why(search, new_run, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ksuit_runner"):
        new_run(search([PAST]).callbacks(tmp_path, ACCURACY, (0.3,)), max_updates=6).train()
    assert (
        "training stops at update 2: accuracy/test is 0.3, worse than the median of the finished trials"
        in caplog.messages
    )


def test_a_resumed_run_reports_nothing_twice_and_ends_where_it_would_have(search, new_run, tmp_path):
    watched = search([PAST])
    given = watched.callbacks(tmp_path, ACCURACY, (0.5, 0.7, 0.3))
    new_run(given, stop_at=1, max_updates=6).train()
    # What a run leaves behind that was killed after update 6, when its last checkpoint was that of update 1.
    trial = watched.study.get_trials(deepcopy=False)[watched.number]
    for update, value in {2: 0.5, 4: 0.7, 6: 0.3}.items():
        watched.study._storage.set_trial_intermediate_value(trial._trial_id, update, value)
    before = watched.trial.intermediate_values
    run = new_run(given, max_updates=6)
    assert run.run.counter.update > 0
    assert run.train().run.counter.update == 6
    assert watched.trial.intermediate_values == before
    assert watched.trial.user_attrs == {PRUNED_AT: 6}


def test_a_resumed_run_reports_what_is_missing(search, new_run, tmp_path):
    watched = search([PAST])
    given = watched.callbacks(tmp_path, ACCURACY, (0.5, 0.7, 0.9))
    new_run(given, stop_at=3, max_updates=6).train()
    assert watched.trial.intermediate_values == {2: 0.5}
    new_run(given, max_updates=6).train()
    assert watched.trial.intermediate_values == {2: 0.5, 4: 0.7, 6: 0.9}


def test_a_run_that_is_resumed_after_the_search_is_not_pruned(search, new_run, tmp_path):
    watched = search([PAST])
    watched.study.tell(watched.number, 0.5)
    run = new_run(watched.callbacks(tmp_path, ACCURACY, (0.1, 0.1, 0.1)), max_updates=6).train()
    assert run.run.counter.update == 6
    assert watched.trial.intermediate_values == {}


def test_a_run_that_is_not_a_trial_is_not_pruned(new_run, tmp_path):
    prune = partial(Prune, path_provider=PathProvider(tmp_path, "tiny"), metric_key=ACCURACY)
    run = new_run({"metric": partial(ScriptedMetric, ACCURACY, (0.1,) * 3), "prune": prune}, max_updates=6).train()
    assert run.run.counter.update == 6
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize("arguments", [{"min_trials": 0}, {"min_updates": -1}])
def test_numbers_that_make_no_sense_are_refused(new_run, tmp_path, arguments):
    prune = partial(Prune, path_provider=PathProvider(tmp_path, "tiny"), metric_key=ACCURACY, **arguments)
    with pytest.raises(ConfigError, match="min_(trials|updates): a whole number of at least"):
        new_run({"prune": prune})


def test_without_optuna_it_says_what_to_install(new_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    prune = partial(Prune, path_provider=PathProvider(tmp_path, "tiny"), metric_key=ACCURACY)
    with pytest.raises(ConfigError, match=r"callbacks\.prune: 'optuna' is not installed"):
        new_run({"prune": prune})


def test_of_several_ranks_one_reports_and_all_stop(search, new_run, tmp_path):
    watched = search([PAST])
    runs = [new_run(watched.callbacks(tmp_path, ACCURACY, (0.3,)), run_id=f"rank{rank}") for rank in range(2)]

    def on_rank(world):
        prune = runs[world.rank]["prune"]
        prune.data_container.world, prune.trainer.counter.update = world, 2
        with pytest.raises(StopTraining, match="worse than the median"):
            prune._process_value(0.3)
        return prune._study is not None

    assert in_threads(2, on_rank) == [True, False]
    assert watched.trial.intermediate_values == {2: 0.3}
