"""What callbacks log belongs to the update at which they log it, in whatever hook, through kills and resumes."""

import signal

import pytest
import torch
from run_maker import points

from callbacks.accuracy import Accuracy
from callbacks.best_checkpoint import BestCheckpoint
from callbacks.throughput import Throughput
from callbacks.train_loss import TrainLoss
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.checkpoint.folders import names, read_tags
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import evaluate, train
from ksuit_runner.errors import ConfigError, KsuitError


def logged(run):
    """Return all points of a run's journal; none is there twice."""
    found = points(run)
    assert len({point[:2] for point in found}) == len(found)
    return found


def of(run, key):
    return {step: value for name, step, value in logged(run) if name == key}


class Source(PeriodicCallback):
    def _periodic_callback(self, update_counter):
        self.writer.add_scalar("source", 10.0 * update_counter.update)


class Reacts(CallbackBase):
    """Logs one metric in reaction to another, and remembers what it has seen."""

    def __init__(self, to, logs_key, fails_at=None, **kwargs):
        super().__init__(**kwargs)
        self.to, self.key, self.fails_at, self.seen = to, logs_key, fails_at, []

    def _after_log(self, update_counter, metrics):
        self.seen.append((update_counter.update, sorted(metrics)))
        if self.to in metrics:
            if update_counter.update == self.fails_at:
                raise ZeroDivisionError("broken")
            self.writer.add_scalar(self.key, metrics[self.to] + 1)

    def state_dict(self):
        return {"seen": [list(item) for item in self.seen]}

    def load_state_dict(self, state_dict):
        self.seen = [tuple(item) for item in state_dict["seen"]]


def chain(**of_last):
    """Three callbacks, each of which logs in reaction to the one that comes after it in the config."""
    return {
        "third": (Reacts, {"to": "second", "logs_key": "third", **of_last}),
        "second": (Reacts, {"to": "first", "logs_key": "second"}),
        "first": (Reacts, {"to": "source", "logs_key": "first"}),
        "source": (Source, {"every_n_updates": 2}),
    }


def test_what_is_logged_in_reaction_belongs_to_the_same_update(maker):
    run = maker.run(chain(), max_updates=4)
    train(run)
    assert of(run, "first") == {2: 21.0, 4: 41.0}
    assert of(run, "third") == {2: 23.0, 4: 43.0}
    assert run.hooks.callbacks["first"].seen[:4] == [(2, ["source"]), (2, ["first"]), (2, ["second"]), (2, ["third"])]


def test_a_run_that_fails_between_two_reactions_resumes_with_the_second(maker):
    whole = maker.run(chain(), run_id="whole", max_updates=6)
    train(whole)
    with pytest.raises(ZeroDivisionError):
        train(maker.run(chain(fails_at=4), max_updates=6))
    unfinished = read_newest(maker.paths()).state["unfinished"]
    assert {key: number for key, (_, _, number) in unfinished["log"].items()} == {"source": 0, "first": 1, "second": 2}
    resumed = maker.run(chain(), max_updates=6, resume=True)
    train(resumed)
    assert sorted(logged(resumed)) == sorted(logged(whole))
    for name in ("first", "second", "third"):
        assert resumed.hooks.callbacks[name].seen == whole.hooks.callbacks[name].seen


def test_reactions_without_end_are_an_error(maker):
    class Endless(CallbackBase):
        def _after_log(self, update_counter, metrics):
            self.writer.add_scalar(f"{max(metrics)}+", 1.0)

    run = maker.run({"source": (Source, {"every_n_updates": 1}), "endless": (Endless, {})})
    with pytest.raises(KsuitError, match="without end"):
        train(run)


def test_the_same_value_in_each_reaction_is_one_point(maker):
    class Same(CallbackBase):
        def _after_log(self, update_counter, metrics):
            self.writer.add_scalar("same", float(update_counter.update))

    run = maker.run({"same": (Same, {}), "source": (Source, {"every_n_updates": 1})}, max_updates=3)
    train(run)
    assert of(run, "same") == {1: 1.0, 2: 2.0, 3: 3.0}


class Says(CallbackBase):
    """Logs its name in one hook, at each call or on request."""

    def __init__(self, hook, fails_at=None, **kwargs):
        super().__init__(**kwargs)
        self.fails_at = fails_at
        setattr(self, f"_{hook}", self.say)

    def say(self, update_counter, **arguments):
        self.writer.add_scalar(self.name, float(update_counter.update))
        if update_counter.update == self.fails_at:
            raise ZeroDivisionError("broken")

    def _before_training(self, update_counter): ...
    def _after_training(self, update_counter): ...
    def _before_every_update(self, update_counter): ...
    def _track_after_accumulation_step(self, update_counter, batch, losses, outputs): ...
    def _after_update(self, update_counter): ...


def test_each_hook_logs_at_its_update(maker):
    run = maker.run(
        {
            "before": (Says, {"hook": "before_every_update"}),
            "step": (Says, {"hook": "track_after_accumulation_step"}),
            "after": (Says, {"hook": "after_update"}),
            "end": (Says, {"hook": "after_training"}),
        },
        max_updates=3,
    )
    train(run)
    assert of(run, "before") == of(run, "step") == {1: 0.0, 2: 1.0, 3: 2.0}  # of the update that is being computed
    assert of(run, "after") == {1: 1.0, 2: 2.0, 3: 3.0}
    assert of(run, "end") == {3: 3.0}


@pytest.mark.parametrize("has_files", [False, True])
def test_what_a_failed_update_logged_is_not_recorded(maker, has_files):
    class InFiles(Says):
        def resume_from_checkpoint(self, resumption_paths, model): ...

    says = (InFiles if has_files else Says, {"hook": "before_every_update", "fails_at": 2})
    run = maker.run({"before": says, "after": (Says, {"hook": "after_update"})})
    with pytest.raises(ZeroDivisionError):
        train(run)
    assert of(run, "before") == {1: 0.0, 2: 1.0}
    assert of(run, "after") == {1: 1.0, 2: 2.0}


def test_a_callback_that_is_new_on_resume_logs_before_training_and_an_old_one_does_not(maker):
    old, new = {"old": (Says, {"hook": "before_training"})}, {"new": (Says, {"hook": "before_training"})}
    train(maker.run(old, max_updates=4))
    for end in (6, 8):
        run = maker.run({**old, **new}, max_updates=end, resume=True)
        train(run)
    assert logged(run) == [("old", 0, 0.0), ("new", 4, 4.0)]


def test_a_run_that_ends_before_its_first_update_reacts_to_its_start_once(maker):
    class Start(CallbackBase):
        def _before_training(self, update_counter):
            self.writer.add_scalar("start", 1.0)

    callbacks = {"start": (Start, {}), "reacts": (Reacts, {"to": "start", "logs_key": "reaction"})}
    run = maker.run(callbacks, max_updates=2)
    run.interruption.signal = signal.SIGTERM
    train(run)
    assert names(maker.paths()) == ["E0_U0_S0"]
    run = maker.run(callbacks, max_updates=2, resume=True)
    train(run)
    assert run.hooks.callbacks["reacts"].seen == [(0, ["start"]), (0, ["reaction"])]
    assert logged(run) == [("start", 0, 1.0), ("reaction", 0, 2.0)]


def test_a_run_that_fails_after_training_does_not_react_to_its_last_update_again(maker):
    class End(CallbackBase):
        fails = True

        def _after_training(self, update_counter):
            self.writer.add_scalar("source", 40.0)  # once more what was logged after the last update
            if End.fails:
                raise ZeroDivisionError("broken")

    callbacks = {**chain(), "end": (End, {})}
    with pytest.raises(ZeroDivisionError):
        train(maker.run(callbacks, max_updates=4))
    End.fails = False
    run = maker.run(callbacks, max_updates=4, resume=True)
    train(run)
    assert [keys for update, keys in run.hooks.callbacks["first"].seen if update == 4].count(["source"]) == 1
    assert of(run, "source") == {2: 20.0, 4: 40.0}


def test_the_best_checkpoint_of_step_0_holds_the_first_weights(maker, bits):
    watched = {"best": (BestCheckpoint, {"metric_key": "accuracy/test"})}
    run = maker.run({"first": (Accuracy, {"dataset_key": "test", "at_start": True, "at_end": False}), **watched})
    first = {name: value.clone() for name, value in run.trainer.model.tensors().items()}
    train(run)
    assert read_tags(maker.paths()) == {"best": "E0_U0_S0"}
    assert bits(read_newest(maker.paths(), "E0_U0_S0").model) == bits(first)


def test_evaluations_of_two_intervals_that_meet_are_one_point(maker):
    run = maker.run(
        {
            "often": (Accuracy, {"dataset_key": "test", "every_n_updates": 2}),
            "epoch": (Accuracy, {"dataset_key": "test", "every_n_epochs": 1, "at_start": True}),
            "end": (Says, {"hook": "after_training"}),
        },
        max_updates=6,
    )
    train(run)
    assert set(of(run, "accuracy/test")) == {0, 2, 3, 4, 6}


@pytest.mark.parametrize(("callback", "key"), [(TrainLoss, "loss/train"), (Throughput, "data_wait_fraction")])
@pytest.mark.parametrize("other", [{"every_n_epochs": 1}, {"every_n_samples": 30}, {"every_n_updates": 2}])
def test_values_of_two_intervals_that_meet_are_refused_before_training(maker, callback, key, other):
    update = 2 if "every_n_updates" in other else ".*"
    pattern = f"callbacks.often and callbacks.rare: both log '{key}' at update {update}"
    with pytest.raises(ConfigError, match=pattern):
        maker.run({"often": (callback, {"every_n_updates": 2}), "rare": (callback, other)}, max_updates=60)


def test_values_of_two_intervals_that_do_not_meet_are_fine(maker):
    pair = {"often": (TrainLoss, {"every_n_updates": 5}), "rare": (TrainLoss, {"every_n_epochs": 2})}
    run = maker.run(pair, max_updates=29)  # 3 updates make an epoch: they meet after 30
    train(run)
    assert len(of(run, "loss/train")) == 9


def test_an_evaluation_of_a_stored_run_records_what_is_logged_in_reaction(maker):
    watched = (BestCheckpoint, {"metric_key": "accuracy/test"})
    callbacks = {
        "accuracy": (Accuracy, {"dataset_key": "test", "every_n_epochs": 1}),
        "again": (Accuracy, {"dataset_key": "test", "every_n_updates": 2}),
        "error": (Reacts, {"to": "accuracy/test", "logs_key": "more"}),
        "best": watched,
    }
    run = maker.run(callbacks)
    run.log_writer.prefix = "eval/"
    run.data.open(run.counter, [])
    torch.manual_seed(0)
    evaluate(run)
    assert [key for key, _, _ in logged(run)] == ["eval/accuracy/test", "eval/more"]
    assert run.hooks.callbacks["best"].best is None  # only training has a best checkpoint
