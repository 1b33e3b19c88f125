"""Any state of a run outlives the process, or is refused when it appears."""

import enum
from collections import deque
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import CheckpointError, ResumeError
from ksuit_runner.trainer.sgd import SgdTrainer

Mood = enum.Enum("Mood", "GOOD")


class Stateful(CallbackBase):
    """Has a state that may be anything, which it is given by the test, and takes note of what it takes up."""

    def __init__(self, value=None, later=None, **kwargs):
        super().__init__(**kwargs)
        self.value, self.later, self.found = value, later, []

    def _after_update(self, update_counter):
        if self.later is not None and update_counter.update == 3:
            self.value = self.later[0]

    def state_dict(self):
        return self.value

    def load_state_dict(self, state_dict):
        self.found.append(state_dict)


class Curriculum(SgdTrainer):
    """A task with a state of its own."""

    own: ClassVar = {"difficulty": np.float64(0.1), "recent": deque([1.0], maxlen=2)}

    def extra_state(self):
        return self.own

    def load_extra_state(self, state):
        self.own = state


class Averaging(torch.optim.SGD):
    """An optimizer whose state and options are numbers of numpy and worse."""

    options: ClassVar = {"history": np.ones(2)}

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].update(self.options)
            group["seen"] = np.int64(1)
        return super().step(closure)


def numpy_cosine(optimizer, total_updates):
    return LambdaLR(optimizer, lambda update: 0.5 * (1 + np.cos(np.pi * update / total_updates)))


@pytest.fixture
def both(maker):
    """Train a run, and again from its third update on; return the last checkpoints of the two."""

    def train_both(callbacks=None, **kwargs):
        options = {"max_updates": 6, "checkpoint": {"every_n_updates": 3, "keep_last": 9}, **kwargs}
        made = (lambda: options["model"]()) if "model" in options else (lambda: None)
        train(maker.run(callbacks, **{**options, "model": made()}))
        resumed = maker.resumed(callbacks, update=3, **{**options, "model": made()})
        train(resumed)
        return [read_newest(maker.paths(run_id)) for run_id in ("run00000", "run00000-resumed")]

    return train_both


def contents(checkpoint):
    """Every byte of a checkpoint by file."""
    return {path.name: path.read_bytes() for path in checkpoint.paths.checkpoint_dir.iterdir()}


def test_numbers_of_numpy_in_trainer_optimizer_and_schedule_are_resumed_exactly(both):
    options = {"optimizer": partial(Averaging, lr=0.1, momentum=0.9), "schedule": numpy_cosine}
    whole, resumed = both(trainer_class=Curriculum, **options)
    assert contents(resumed) == contents(whole)
    state = resumed.state["trainer"]
    assert type(state["extra"]["difficulty"]) is np.float64 and state["extra"]["recent"] == deque([1.0], maxlen=2)
    assert type(state["optimizer"]["groups"]["default"]["seen"]) is np.int64
    assert type(state["optimizer"]["groups"]["default"]["lr"]) is np.float64


@pytest.mark.parametrize("value", [[1, 2], torch.ones(2), 3, "text", deque([np.float32(1)])], ids=str)
def test_a_callbacks_state_may_be_any_value(maker, value):
    train(maker.run({"mine": (Stateful, {"value": value})}))
    found = maker.run({"mine": (Stateful, {})}, resume=True).hooks.callbacks["mine"].found
    assert len(found) == 1 and type(found[0]) is type(value) and repr(found[0]) == repr(value)


@pytest.mark.parametrize(("value", "later"), [(None, [{"a": 1}]), ({"a": 1}, [None])], ids=["appears", "vanishes"])
def test_a_state_that_appears_or_disappears_is_resumed(maker, value, later):
    train(maker.run({"mine": (Stateful, {"value": value, "later": later})}))
    found = maker.run({"mine": (Stateful, {"value": value})}, resume=True).hooks.callbacks["mine"].found
    assert found == [state for state in later if state is not None]
    with pytest.raises(ResumeError, match="other is new"):
        maker.run({"mine": (Stateful, {}), "other": (Stateful, {})}, resume=True)


def test_the_trainers_state_holds_those_of_the_callbacks(maker):
    run = maker.run({"mine": (Stateful, {"value": [4711]}), "none": (CallbackBase, {})})
    assert run.trainer.state_dict()["callbacks"] == {"mine": [4711]}


@pytest.mark.parametrize(
    ("options", "update", "message"),
    [
        ({"trainer_class": type("Own", (Curriculum,), {"own": {"mood": [Mood.GOOD]}})}, 0, r"trainer.*\['mood'\]\[0\]"),
        (
            {"optimizer": partial(type("Odd", (Averaging,), {"options": {"mood": Mood.GOOD}}), lr=0.1)},
            1,
            r"trainer\['optimizer'\]\['parameters'\]\['0.weight'\]\['mood'\]",
        ),
        ({"callbacks": {"mine": (Stateful, {"value": {"mood": Mood.GOOD}})}}, 0, r"callbacks.mine: .*\['mood'\]"),
        ({"callbacks": {"mine": (Stateful, {"later": [Mood.GOOD]})}}, 3, r"callbacks.mine: state_dict\(\)"),
    ],
    ids=["trainer", "optimizer", "callback", "callback, later"],
)
def test_a_state_that_cannot_be_stored_ends_the_run_where_it_appears(maker, options, update, message):
    run = maker.run(**{"checkpoint": {"every_n_updates": 3}, **options})
    with pytest.raises(CheckpointError, match=message + ": a test_state.Mood cannot be stored"):
        train(run)
    assert run.counter.update == update


def test_a_state_from_before_losses_and_layouts_were_stored_is_loaded(maker, bits):
    run = maker.run()
    train(run)
    stored = read_newest(maker.paths()).state["trainer"]
    first = {key: stored[key] for key in ("optimizer", "schedule", "scaler", "counter")}
    trainer = maker.trainer()
    trainer.load_state_dict(first)
    assert bits(trainer.state_dict()["optimizer"]) == bits(stored["optimizer"])
