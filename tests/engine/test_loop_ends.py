"""How a run ends, and what it leaves: by its end, a signal, an error, or another process."""

import errno
import signal
import sys
from asyncio import CancelledError

import pytest
from run_maker import points
from torch import nn

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint import writer as checkpoint
from ksuit_runner.checkpoint.folders import names, read_tags
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import CheckpointError, TakenOverError


class Losses(CallbackBase):
    """Logs the loss of each update."""

    def _track_after_accumulation_step(self, update_counter, batch, losses, outputs):
        self.last = losses["total"]

    def _after_update(self, update_counter):
        self.writer.add_scalar("loss/train", self.last)


class Raises(CallbackBase):
    """Raises an error after an update, and notes the errors of which it is notified."""

    def __init__(self, update, **kwargs):
        super().__init__(**kwargs)
        self.update, self.seen = update, []

    def _after_update(self, update_counter):
        if update_counter.update == self.update:
            raise ZeroDivisionError("broken")

    def _on_exception(self, error):
        self.seen.append(error)


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


def test_callbacks_are_notified_of_an_error_which_says_where_it_was(maker):
    run = maker.run({"raises": (Raises, {"update": 5})}, checkpoint={"every_n_updates": 2})
    with pytest.raises(ZeroDivisionError) as info:
        train(run)
    assert run.hooks.callbacks["raises"].seen == [info.value]
    assert info.value.__notes__ == [
        "raised in callback 'raises', hook after_update",
        "raised after update 5",
    ]
    assert read_newest(maker.paths()).progress.update == 5


@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, CancelledError, KeyboardInterrupt])
def test_a_base_exception_ends_the_run_as_an_error_does(maker, kind):
    class Leaves(Raises):
        def _after_update(self, update_counter):
            if update_counter.update == self.update:
                raise kind

        def _on_exception(self, error):
            super()._on_exception(error)
            raise kind

    run = maker.run({"leaves": (Leaves, {"update": 5})}, checkpoint={"every_n_updates": 2})
    with pytest.raises(kind) as info:
        train(run)
    assert run.hooks.callbacks["leaves"].seen == [info.value]
    assert info.value.__notes__[:2] == ["raised in callback 'leaves', hook after_update", "raised after update 5"]
    assert read_newest(maker.paths()).progress.update == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_ends_the_process_is_an_error_that_names_it(maker, workers):
    run = maker.run(num_workers=workers)

    class Leaves(type(run.data.train_dataset)):
        def __getitem__(self, index):
            sys.exit(0)

    run.data.train_dataset.__class__ = Leaves
    with pytest.raises(RuntimeError, match=r"data\.datasets\.train tried to end the process: SystemExit\(0\)"):
        train(run)


def test_a_second_interrupt_saves_nothing_more(maker):
    class Interrupts(CallbackBase):
        def _after_update(self, update_counter):
            if update_counter.update == 5:
                run.interruption.handle(signal.SIGINT, None)
                run.interruption.handle(signal.SIGINT, None)

    run = maker.run({"interrupts": (Interrupts, {})})
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert names(maker.paths()) == []


def test_an_error_while_callbacks_are_notified_of_one_hides_nothing(maker):
    class Clumsy(Raises):
        def _on_exception(self, error):
            raise LookupError("clumsy")

    with pytest.raises(ZeroDivisionError, match="broken") as info:
        train(maker.run({"clumsy": (Clumsy, {"update": 5})}))
    assert "clumsy" in info.value.__notes__[-1]


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


class Counts(Raises):
    """Logs of how many errors it was notified."""

    def _on_exception(self, error):
        super()._on_exception(error)
        self.writer.add_scalar("errors", float(len(self.seen)))


def test_what_callbacks_log_of_an_error_is_recorded_and_not_what_the_failed_hook_logged(maker):
    class Half(Counts):
        def _after_update(self, update_counter):
            if update_counter.update == self.update:
                self.writer.add_scalar("half", 1.0)  # after the resume it may be another value
            super()._after_update(update_counter)

    run = maker.run({"half": (Half, {"update": 2})})
    with pytest.raises(ZeroDivisionError):
        train(run)
    assert points(run) == [("errors", 2, 1.0)]


def test_a_run_that_was_taken_over_ends_and_writes_nothing_more(maker):
    class TakenOver(Counts):
        def _after_update(self, update_counter):
            if update_counter.update == 4:
                run.taken_over.set()

    run = maker.run({"taken": (TakenOver, {"update": None})})
    with pytest.raises(TakenOverError, match="another process has taken over"):
        train(run)
    assert len(run.hooks.callbacks["taken"].seen) == 1
    assert names(maker.paths()) == points(run) == []


def test_a_checkpoint_that_was_asked_for_before_an_error_is_made_after_the_resume(maker):
    class Asks(CallbackBase):
        def _after_update(self, update_counter):
            if update_counter.update == 5:
                self.checkpoint_writer.request("asked")

    asks = {"asks": (Asks, {})}
    with pytest.raises(ZeroDivisionError):
        train(maker.run({**asks, "raises": (Raises, {"update": 5})}))
    assert read_tags(maker.paths()) == {}
    train(maker.run({**asks, "raises": (Raises, {"update": None})}, resume=True))
    assert read_tags(maker.paths()) == {"asked": "E1_U5_S30"}


def test_nothing_is_left_to_do_after_the_end(maker):
    run = maker.run({"l": (Losses, {})})
    assert not run.is_finished
    train(run)
    assert run.is_finished
    assert read_newest(maker.paths()).state["unfinished"] is None


class CountsEarly(CallbackBase):
    """Has a state, and no hook that follows an update."""

    count = 0

    def _before_every_update(self, update_counter):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


def test_a_checkpoint_has_the_present_state_of_a_callback_without_a_later_hook(maker):
    train(maker.run({"counts": (CountsEarly, {})}, max_updates=3))
    assert read_newest(maker.paths()).state["callbacks"]["counts"] == {"count": 3}


def test_metrics_are_on_the_disk_before_the_checkpoint_that_follows_them(maker):
    seen = []

    class Order(CallbackBase):
        def state_dict(self):
            steps = [point.step for line, _ in run.log_writer._journal.read() for point in line]
            seen.append((run.counter.update, max(steps, default=0)))
            return {}

    run = maker.run({"l": (Losses, {}), "order": (Order, {})}, checkpoint={"every_n_updates": 2})
    train(run)
    assert {2, 4, 6, 8} <= {update for update, _ in seen}
    assert all(update == logged for update, logged in seen)


def test_after_log_comes_before_the_checkpoint_and_may_ask_for_it(maker):
    class Best(CallbackBase):
        def _after_log(self, update_counter, metrics):
            if update_counter.update == 5:
                self.checkpoint_writer.request("best")

    train(maker.run({"best": (Best, {}), "l": (Losses, {})}))
    assert sorted(names(maker.paths())) == ["E1_U5_S30", "E2_U8_S48"]


def test_batch_norm_is_part_of_the_weights(maker):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    train(maker.run(model=model))
    assert read_newest(maker.paths()).model["1.num_batches_tracked"] == 8


class FullDisk:
    """Fails to write for the first times."""

    def __init__(self, times, error=errno.ENOSPC):
        self.left, self.error = times, error

    def __call__(self):
        if self.left:
            self.left -= 1
            raise OSError(self.error, "full")


@pytest.fixture
def naps(monkeypatch):
    """Let no time pass but what is slept through, and return how long each time."""
    naps = []
    monkeypatch.setattr(checkpoint, "sleep", naps.append)
    monkeypatch.setattr(checkpoint, "monotonic", lambda: 1000 + sum(naps))
    return naps


def test_the_last_checkpoint_waits_for_room_on_a_full_disk(maker, naps, caplog):
    run = maker.run()
    run.log_writer.write_rest = FullDisk(3)
    train(run)
    assert read_newest(maker.paths()).progress.update == 8
    assert caplog.text.count("the last checkpoint waits for room, up to 30 s") == 1
    assert naps == [0.5] * 3


@pytest.mark.parametrize(("why", "times"), [("signal", 2), ("time", 61), ("a shorter time", 3), ("another error", 0)])
def test_that_wait_has_an_end(maker, naps, why, times):
    run = maker.run(checkpoint={"room_timeout_s": 1} if why == "a shorter time" else {})
    run.log_writer.write_rest = FullDisk(10**9, errno.EIO if why == "another error" else errno.EDQUOT)
    run.checkpoint_writer.is_urgent = lambda: why == "signal" and len(naps) == 2
    with pytest.raises(CheckpointError, match="full"):
        train(run)
    assert len(naps) == times
