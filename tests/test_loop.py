import random
import signal

import numpy as np
import pytest
import torch
from torch import nn

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint_format import names, read_newest
from ksuit_runner.errors import ResumeError
from ksuit_runner.hooks import HOOKS
from ksuit_runner.loop import train
from ksuit_runner.periodic_callback import DatasetCallback, PeriodicCallback


def result(maker, run_id="run00000"):
    """Return what a run has left: the bytes of its weights, the state of its trainer, its metrics."""
    found = read_newest(maker.paths(run_id))
    run = next(run for run in reversed(maker.runs) if run.checkpoint_writer.path_provider.run_id == run_id)
    points = [(key, step, value) for entry, _ in run.log_writer._journal.read() for key, value, step, _ in entry]
    return (found.paths.checkpoint_dir / "model.safetensors").read_bytes(), found.state["trainer"], points


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


class Raises(CallbackBase):
    def __init__(self, update, hook="after_update", kill=False, **kwargs):
        super().__init__(**kwargs)
        self.update, self.hook, self.kill, self.seen = update, hook, kill, []

    def _after_update(self, update_counter):
        self._raise("after_update", update_counter)

    def _before_every_update(self, update_counter):
        self._raise("before_every_update", update_counter)

    def _raise(self, hook, counter):
        if (hook, counter.update) == (self.hook, self.update):
            raise Killed if self.kill else ZeroDivisionError("broken")

    def _on_exception(self, error):
        self.seen.append(error)


class Killed(BaseException):
    """Ends a run without anything that a run does at its end."""


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
    other.seed = 4
    train(other)
    train(maker.run(run_id="three", dropout=0.0))
    assert len({result(maker, run_id)[0] for run_id in ("one", "two", "three")}) == 3


# Exact


@pytest.mark.parametrize(("update", "workers"), [(1, (0, 0)), (5, (0, 2)), (6, (1, 0)), (7, (0, 0)), (11, (0, 0))])
def test_a_resumed_run_is_the_uninterrupted_one_byte_for_byte(maker, bits, update, workers):
    """With dropout, an augmenting dataset, accumulation, smaller last batches, evaluation, and states of callbacks."""
    callbacks = {"l": (Losses, {}), "s": (Sum, SUM), "g": (Gambler, {"every_n_epochs": 1})}
    options = {"checkpoint": {"every_n_updates": 3}, **HARD}
    train(maker.run(callbacks, run_id="whole", **options))
    killed = {**callbacks, "kill": (Raises, {"update": update, "kill": True})}
    with pytest.raises(Killed):
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


# How a run ends


@pytest.mark.parametrize("ends", [{"max_updates": 5}, {"max_epochs": 2}, {"max_samples": 25}])
def test_the_last_checkpoint_is_that_of_the_end(maker, ends):
    run = maker.run(**ends)
    train(run)
    found = read_newest(maker.paths())
    assert found.progress == run.counter.progress
    assert run.counter.is_finished


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_update_with_a_checkpoint(maker, number):
    class Signal(CallbackBase):
        def _before_every_backward(self, update_counter, losses):
            if update_counter.update == 3:
                run.interruption.signal = number

        def _after_training(self, update_counter):
            raise AssertionError("training has not ended")

    run = maker.run({"signal": (Signal, {})})
    train(run)
    assert read_newest(maker.paths()).progress.update == run.counter.update == 4


def test_an_error_in_an_update_leaves_the_earlier_checkpoint(maker):
    """In the middle of an update there is no state to go on from exactly."""
    run = maker.run({"raises": (Raises, {"update": 5})}, checkpoint={"every_n_updates": 2})
    with pytest.raises(ZeroDivisionError) as info:
        train(run)
    assert run.hooks.callbacks["raises"].seen == [info.value]
    run.checkpoint_writer.wait()
    assert read_newest(maker.paths()).progress.update == 4


def test_an_error_between_updates_leaves_a_checkpoint(maker):
    run = maker.run()
    dataset, fetched = run.data.datasets["train"], []

    class Broken:
        def __len__(self):
            return len(dataset)

        def __getitem__(self, index):
            fetched.append(index)
            if len(fetched) > 30:
                raise ZeroDivisionError("broken sample")
            return dataset[index]

    run.data.datasets["train"] = Broken()
    with pytest.raises(ZeroDivisionError):
        train(run)
    assert read_newest(maker.paths()).progress.update == 5


def test_a_run_that_was_taken_over_ends_and_writes_nothing_more(maker):
    class TakenOver(CallbackBase):
        def _after_update(self, update_counter):
            if update_counter.update == 4:
                run.taken_over.set()

    run = maker.run({"taken": (TakenOver, {})})
    with pytest.raises(ResumeError, match="another process goes on"):
        train(run)
    assert names(maker.paths()) == []


def test_metrics_are_on_the_disk_before_the_checkpoint_that_follows_them(maker):
    seen = []

    class Order(CallbackBase):
        def state_dict(self):
            points = [point.step for points, _ in run.log_writer._journal.read() for point in points]
            seen.append((run.counter.update, max(points, default=None)))
            return {}

    run = maker.run({"l": (Losses, {}), "order": (Order, {})}, checkpoint={"every_n_updates": 2})
    seen.clear()
    train(run)
    assert seen == [(2, 2), (4, 4), (6, 6), (8, 8)]


def test_after_log_comes_before_the_checkpoint_and_may_ask_for_it(maker):
    class Best(CallbackBase):
        def _after_log(self, update_counter, metrics):
            if update_counter.update == 5:
                self.checkpoint_writer.request("best")

    train(maker.run({"best": (Best, {}), "l": (Losses, {})}))
    assert sorted(names(maker.paths())) == ["E1_U5_S30", "E2_U8_S48"]


def test_batch_norm_is_part_of_the_weights(maker):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    train(maker.run({"s": (Sum, SUM)}, model=model))
    assert read_newest(maker.paths()).model["1.num_batches_tracked"] == 8
