import random
import signal

import numpy as np
import pytest
import torch
from run_maker import points

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback
from ksuit_runner.checkpoint.folders import names
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.hooks import HOOKS
from ksuit_runner.engine.loop import train
from ksuit_runner.engine.step_seeds import StepSeeds


def result(maker, run_id="run00000"):
    """Return what a run has left: the bytes of its weights, the state of its trainer, its metrics."""
    found = read_newest(maker.paths(run_id))
    run = next(run for run in reversed(maker.runs) if run.checkpoint_writer.path_provider.run_id == run_id)
    return (found.paths.checkpoint_dir / "model.safetensors").read_bytes(), found.state["trainer"], points(run)


class Gambler(PeriodicCallback):
    """Draws random numbers in every hook, and in its constructor."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        _draw(self)


def _draw(self, **arguments):
    torch.rand(17), np.random.random(3), random.random()
    torch.manual_seed(int(torch.randint(99, ())))


for _hook in (*HOOKS, "periodic_callback"):
    setattr(Gambler, f"_{_hook}", _draw)


class Sum(DatasetCallback):
    """Evaluates a dataset, in a mode of the model and at a time of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.total = 0.0

    def _process_batch(self, batch, models):
        self.total += self.trainer.predict(batch[0], models[""]).double().sum().item()

    def _process_results(self, update_counter):
        self.writer.add_scalar(f"sum/{self.name}", self.total)
        self.total = 0.0


class Losses(CallbackBase):
    """Logs the loss of each update, and the mean of all so far, which is its state."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.sum = torch.zeros(())

    def _track_after_accumulation_step(self, update_counter, batch, losses, outputs):
        self.sum += losses["total"]
        self.last = losses["total"]

    def _after_update(self, update_counter):
        self.writer.add_scalar("loss/train", self.last)
        self.writer.add_scalar("loss/sum", self.sum)

    def state_dict(self):
        return {"sum": self.sum}

    def load_state_dict(self, state_dict):
        self.sum = state_dict["sum"].clone()


class Dies(CallbackBase):
    """Ends a run after an update as SIGKILL does: nothing that is done at an end is done."""

    def __init__(self, update, **kwargs):
        super().__init__(**kwargs)
        self.update = update

    def _after_update(self, update_counter):
        if update_counter.update == self.update:
            self.data_container.interruption.signal = signal.SIGINT
            raise Killed


class Killed(KeyboardInterrupt):
    """As the second Ctrl-C, which ends a run at once."""


SUM = {"dataset_key": "test", "every_n_updates": 2}
HARD = {"drop_last": False, "accumulation_steps": 2, "max_epochs": 3}


# Undisturbed


@pytest.mark.parametrize("options", [{}, HARD], ids=["plain", "accumulation"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_callbacks_that_draw_random_numbers_change_no_bit_of_the_weights(maker, bits, options, num_workers):
    train(maker.run(run_id="without", **options))
    gamblers = {"g": (Gambler, {"every_n_updates": 1}), "h": (Gambler, {"every_n_epochs": 1})}
    train(maker.run(gamblers, run_id="with", num_workers=num_workers, **options))
    assert bits(result(maker, "with")[:2]) == bits(result(maker, "without")[:2])


class Noise(CallbackBase):
    """Writes to the batch before it is used, as a mixup does."""

    def _before_every_accumulation_step(self, update_counter, batch):
        batch[0].add_(torch.randn_like(batch[0]) + random.random())


def test_what_a_callback_draws_for_the_batch_does_not_depend_on_the_workers(maker, bits):
    for num_workers in (0, 2):
        train(maker.run({"noise": (Noise, {})}, run_id=f"workers{num_workers}", num_workers=num_workers))
    assert bits(result(maker, "workers0")) == bits(result(maker, "workers2"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_adding_and_reordering_callbacks_changes_no_bit_of_training(maker, bits, num_workers):
    some = {"a": (Sum, SUM), "l": (Losses, {}), "b": (Sum, {"dataset_key": "train", "every_n_epochs": 1})}
    sets = {"none": {}, "some": some, "turned": dict(reversed(some.items()))}
    for run_id, callbacks in sets.items():
        train(maker.run(callbacks, run_id=run_id, num_workers=num_workers if callbacks else 0))
    none, one, two = (result(maker, run_id) for run_id in sets)
    assert bits(one[:2]) == bits(two[:2]) == bits(none[:2])
    assert sorted(one[2]) == sorted(two[2]) and len(one[2]) > 16


def test_the_run_depends_on_its_seed_and_on_dropout(maker):
    """Without this the tests above could not fail."""
    train(maker.run(run_id="one"))
    other = maker.run(run_id="two")
    other.seeds = StepSeeds(4, other.counter)
    train(other)
    train(maker.run(run_id="three", dropout=0.0))
    assert len({result(maker, run_id)[0] for run_id in ("one", "two", "three")}) == 3


# Exact


@pytest.mark.parametrize(("update", "workers"), [(1, (0, 0)), (5, (0, 2)), (6, (1, 0)), (7, (0, 0)), (11, (0, 0))])
def test_a_resumed_run_is_the_uninterrupted_one_byte_for_byte(maker, bits, update, workers, monkeypatch):
    """With dropout, an augmenting dataset, accumulation, smaller last batches, evaluation, and states of callbacks."""
    callbacks = {"l": (Losses, {}), "s": (Sum, SUM), "g": (Gambler, {"every_n_epochs": 1})}
    options = {"checkpoint": {"every_n_updates": 3}, **HARD}
    train(maker.run(callbacks, run_id="whole", **options))
    killed = {**callbacks, "kill": (Dies, {"update": update})}
    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr(
            "ksuit_runner.engine.loop.save_last_full_update", lambda run: None
        )  # SIGKILL leaves no time for it
        train(maker.run(killed, run_id="killed", num_workers=workers[0], **options))
    maker.close()
    resumes = bool(names(maker.paths("killed")))
    assert resumes is (update > 3)
    train(maker.run(callbacks, run_id="killed", resume=resumes, num_workers=workers[1], **options))
    whole, resumed = result(maker, "whole"), result(maker, "killed")
    assert resumed[0] == whole[0]
    assert bits(resumed[1]) == bits(whole[1])
    assert not resumes or sorted(resumed[2]) == sorted(whole[2])
    assert read_newest(maker.paths("killed")).state["callbacks"] == read_newest(maker.paths("whole")).state["callbacks"]


def test_what_is_logged_at_the_start_is_logged_once(maker):
    class Start(CallbackBase):
        def _before_training(self, update_counter):
            self.writer.add_scalar("size", 1.0)

    train(maker.run({"start": (Start, {})}, max_updates=4))
    train(maker.run({"start": (Start, {})}, max_updates=8, resume=True))
    assert result(maker)[2] == [("size", 0, 1.0)]
