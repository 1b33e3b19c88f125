"""What acts at the start and at the end of a run, wherever that is, acts once, through failures and resumes."""

import signal

import pytest
from run_maker import points

from callbacks.best_checkpoint import BestCheckpoint
from callbacks.loss import Loss
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.checkpoint.folders import read_tags
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import StopTraining

LOSS = (Loss, {"dataset_key": "test", "every_n_epochs": 1, "at_start": True})


class Ends(CallbackBase):
    """Ends training after an update."""

    def __init__(self, update, **kwargs):
        super().__init__(**kwargs)
        self.update = update

    def _after_log(self, update_counter, metrics):
        if update_counter.update == self.update:
            raise StopTraining("enough")

    def _after_update(self, update_counter):
        self.writer.add_scalar("x", 1.0)


class Notes(PeriodicCallback):
    """Notes at which updates it acts; may fail or be interrupted there."""

    does = None  # by update

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.updates = []

    def _periodic_callback(self, update_counter):
        if self.does:
            update, do = self.does
            if update == update_counter.update:
                do(self)
        self.updates.append(update_counter.update)

    def state_dict(self):
        return {"updates": list(self.updates)}

    def load_state_dict(self, state_dict):
        self.updates = list(state_dict["updates"])


def fail(callback):
    raise ZeroDivisionError("broken")


def interrupt(callback):
    callback.data_container.interruption.signal = signal.SIGTERM


def notes(does=None, **interval):
    return type("Notes", (Notes,), {"does": does}), interval


def losses(run):
    found = [(step, value) for key, step, value in points(run) if key == "loss/test"]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_a_run_that_ends_inside_an_epoch_is_evaluated_at_its_end(maker):
    run = maker.run({"loss": LOSS, "best": (BestCheckpoint, {"metric_key": "loss/test"})}, max_updates=8)
    train(run)
    assert list(losses(run)) == [0, 3, 6, 8]
    assert read_tags(maker.paths()) == {"best": "E2_U8_S48"}


def test_so_is_a_run_that_a_callback_ends_and_what_is_due_anyway_acts_once(maker):
    at_end = {"at_end": True}
    callbacks = {
        "ends": (Ends, {"update": 4}),
        "loss": LOSS,
        "best": (BestCheckpoint, {"metric_key": "loss/test"}),
        "both": notes(every_n_updates=2, **at_end),
        "end": notes(**at_end),
    }
    run = maker.run(callbacks)
    train(run)
    assert list(losses(run)) == [0, 3, 4]
    assert run.hooks.callbacks["both"].updates == [2, 4] and run.hooks.callbacks["end"].updates == [4]
    assert read_tags(maker.paths()) == {"best": "E1_U4_S24"}
    assert read_newest(maker.paths()).state["unfinished"] is None


def test_an_end_before_the_first_update_is_one_evaluation(maker):
    class Never(CallbackBase):
        def _before_training(self, update_counter):
            raise StopTraining("never")

    run = maker.run({"never": (Never, {}), "loss": LOSS, "end": notes(at_end=True)})
    train(run)
    assert list(losses(run)) == run.hooks.callbacks["end"].updates == [0]


def test_the_start_is_not_repeated_by_a_resume(maker):
    train(maker.run({"loss": LOSS, "start": notes((0, interrupt), at_start=True)}))
    found = read_newest(maker.paths())
    assert found.progress.update == 0 and found.state["unfinished"] is None
    run = maker.run({"loss": LOSS, "start": notes((0, fail), at_start=True)}, resume=True)
    train(run)
    assert list(losses(run)) == [0, 3, 6, 8]
    assert run.hooks.callbacks["start"].updates == [0]


@pytest.mark.parametrize("do", [fail, interrupt])
@pytest.mark.parametrize("update", [0, 4])
def test_what_is_interrupted_at_the_start_or_the_end_resumes_with_the_next(maker, bits, update, do):
    def callbacks(does=None):
        interval = {"at_start": True, "at_end": True}
        return {
            "first": notes(**interval),
            "broken": notes(does, **interval),
            "loss": LOSS,
            "last": notes(**interval),
            "ends": (Ends, {"update": 4}),
        }

    whole = maker.run(callbacks(), run_id="whole")
    train(whole)
    run = maker.run(callbacks((update, do)))
    if do is fail:
        with pytest.raises(ZeroDivisionError):
            train(run)
    else:
        train(run)
        assert not run.is_finished
    maker.close()
    resumed = maker.run(callbacks(), resume=True)
    train(resumed)
    assert losses(resumed) == losses(whole) and list(losses(whole)) == [0, 3, 4]
    assert {name: resumed.hooks.callbacks[name].updates for name in ("first", "broken", "last")} == {
        name: [0, 4] for name in ("first", "broken", "last")
    }
    assert resumed.is_finished
    assert bits(resumed.trainer.model.tensors()) == bits(whole.trainer.model.tensors())
