from functools import partial

import pytest
import torch

from callbacks.loss import Loss
from callbacks.times import Times
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.engine import stopwatch
from ksuit_runner.engine.phases import Phases
from ksuit_runner.trainer.sgd import SgdTrainer

now = 0.0


def passes(seconds):
    global now
    now += seconds


class Timed(SgdTrainer):
    def training_step(self, batch, model):
        passes(1 if self.counter.update % 2 else 3)
        losses, outputs = super().training_step(batch, model)
        if model.training:
            losses["total"].register_hook(lambda gradient: passes(100))
        return losses, outputs

    def to_device(self, batch):
        passes(10)
        return super().to_device(batch)

    def step(self, again=None):
        passes(1000)
        super().step(again)


class Slow(CallbackBase):
    def _track_after_update_step(self, update_counter):
        passes(20_000)

    def _before_every_update(self, update_counter):
        passes(10_000)


class Beginning(CallbackBase):
    def _before_training(self, update_counter):
        passes(1_000_000)  # which is part of no update


class Reader(DatasetCallback):
    def __init__(self, seconds, **kwargs):
        super().__init__("test", max_batches=1, every_n_updates=2, at_end=False, **kwargs)
        self.seconds = seconds

    def _process_batch(self, batch, models):
        passes(self.seconds)

    def _process_results(self, update_counter):
        pass


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: now)


def test_each_phase_has_its_time_and_each_callback_its_share(new_run):
    callbacks = {
        "slow": Slow,
        "first": partial(Reader, 100_000),
        "second": partial(Reader, 200_000),
        "times": partial(Times, every_n_updates=4),
        "beginning": Beginning,
    }
    run = new_run(callbacks, trainer_class=Timed, max_updates=8).train()
    last = {key: run.metric(key)[8] for key in run.metrics()}
    assert run.metric("time/data/mean") == {4: 10, 8: 10}
    assert last.items() >= {"time/forward/mean": 2, "time/forward/max": 3, "time/backward/mean": 100}.items()
    assert last.items() >= {"time/step/mean": 1000, "time/step/max": 1000, "time/log/mean": 0}.items()
    # The two read every second update together, and the batch is moved to the device once, for the first one.
    assert last.items() >= {"time/callback/first": 50_005, "time/callback/second": 100_000}.items()
    assert last.items() >= {"time/callback/slow": 30_000, "time/callback/times": 0}.items()
    assert last.items() >= {"time/callbacks/mean": 180_005, "time/callbacks/max": 330_010}.items()
    assert last["time/update/mean"] == 10 + 2 + 100 + 1000 + 180_005
    assert run.metric("time/update/max") == dict.fromkeys((4, 8), 10 + 1 + 100 + 1000 + 330_010)


def test_a_run_without_it_is_not_watched(new_run):
    run = new_run({"loss": partial(Loss, dataset_key="test", every_n_epochs=1)}, max_updates=1).train()
    for item in (run.run.trainer, run.run.data, run.run.log_writer, run["loss"]):
        assert not vars(item).keys() & {"step", "next_training_batch", "flush", "periodic_callback"}


def test_a_watcher_hears_the_end_of_what_fails():
    heard = []

    class Watcher:
        def begin(self, phase):
            heard.append(phase)

        def end(self, phase):
            heard.append(f"{phase} ended")

    def fail():
        raise ValueError

    phases = Phases()
    phases.watch(Watcher())
    with pytest.raises(ValueError):
        phases._watched("step", fail)()
    assert heard == ["step", "step ended"]


def test_on_a_gpu_what_it_computes_lasts_as_long_as_between_its_events(monkeypatch):
    read = []

    class Event:
        def __init__(self, enable_timing):
            self.time = now

        def record(self):
            passes(0.5)

        def synchronize(self):
            read.append(self.time)

        def elapsed_time(self, other):
            return 1e3 * (other.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = stopwatch.Stopwatch(torch.device("cuda"))
    for update in range(100):
        for phase in ("data", "forward", "step"):
            watch.begin(phase)
            passes(update)
            watch.end(phase)
    assert 0 < len(read) < 100
    means, largest = watch.take()
    assert len(read) == 200
    assert means["forward"] == 0.5 + 99 / 2
    assert largest["step"] == 0.5 + 99
    assert watch.take() == ({}, {})
