"""A run without updates: every periodic callback acts once, and nothing is trained."""

import signal

import pytest
from run_maker import points

from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import train


class Size(DatasetCallback):
    """Logs the size of a dataset as it goes through it; may be asked to end meanwhile."""

    interrupts = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.size = 0

    def _before_training(self, update_counter):
        self.checkpoint_writer.request("early")

    def _process_batch(self, batch, models):
        self.size += len(batch[0])

    def _process_results(self, update_counter):
        self.writer.add_scalar(f"size/{self.name}", self.size)
        self.size = 0
        if self.interrupts:
            self.data_container.interruption.signal = signal.SIGTERM


class Interrupts(Size):
    interrupts = True


class Counts(PeriodicCallback):
    """Counts the hooks of a run."""

    seen: list

    def _periodic_callback(self, update_counter):
        self.seen.append("periodic")

    def _after_update(self, update_counter):
        self.seen.append("update")

    def _after_training(self, update_counter):
        self.seen.append("training")


def callbacks(seen, first=Size):
    return {
        "first": (first, {"dataset_key": "test", "every_n_epochs": 1}),
        "second": (Size, {"dataset_key": "train", "every_n_updates": 100}),
        "counts": (type("Counting", (Counts,), {"seen": seen}), {"every_n_samples": 3}),
    }


WANTED = [("size/first", 0, 7.0), ("size/second", 0, 20.0)]


@pytest.mark.parametrize("end", ["max_epochs", "max_updates", "max_samples"])
def test_every_periodic_callback_acts_once(maker, bits, end):
    seen = []
    run = maker.run(callbacks(seen), **{end: 0})
    before = bits(run.trainer.model.tensors())
    assert not run.is_finished
    train(run)
    assert points(run) == WANTED
    assert seen == ["periodic", "training"]
    assert bits(run.trainer.model.tensors()) == before
    assert str(read_newest(maker.paths()).progress) == "E0_U0_S0" and run.is_finished
    assert maker.run(callbacks(seen), resume=True, **{end: 0}).is_finished  # nothing is left to do


def test_a_frozen_model_can_be_evaluated(maker):
    run = maker.run(callbacks([]), max_epochs=0)
    run = maker.run(callbacks([]), run_id="frozen", model=run.trainer.model.module.requires_grad_(False), max_epochs=0)
    train(run)
    assert points(run) == WANTED


def test_an_interrupted_one_resumes_with_the_next_callback(maker):
    seen = []
    run = maker.run(callbacks(seen, Interrupts), max_epochs=0)
    train(run)
    assert not run.is_finished and not seen
    maker.close()
    run = maker.run(callbacks(seen), max_epochs=0, resume=True)
    train(run)
    assert points(run) == WANTED
    assert seen == ["periodic", "training"] and run.is_finished
