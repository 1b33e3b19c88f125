import logging
import math
from math import inf, nan
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, KsuitError, TrackerError
from ksuit_runner.log_writer import LogWriter
from ksuit_runner.metric_property import MetricPropertyProvider, Summary
from ksuit_runner.record.journal import Journal
from ksuit_runner.tracker.mlflow_client import check_key


class Log:
    """A writer with the journal that it fills and the counter that it looks at."""

    def __init__(self, path, is_logged=lambda key, step: False, check_key=check_key):
        self.counter = UpdateCounter(100, 1, max_epochs=1)
        self.journal = Journal(path)
        self.writer = LogWriter(
            self.journal, self.counter, MetricPropertyProvider(), check_key, is_logged, path.parent / "artifacts"
        )

    def add(self, update, source="a", **metrics):
        self.counter.update, self.writer.source = update, source
        for key, value in metrics.items():
            self.writer.add_scalar(key, value)

    def points(self):
        return [(point.key, point.step, point.value) for points, _ in self.journal.read() for point in points]


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path / "metrics.jsonl")
    yield log
    log.journal.close()


def test_points_are_written_at_the_flush_with_the_update_as_step(log):
    log.add(3, loss=0.5, accuracy=1)
    assert log.points() == []
    assert log.writer.flush() == {"loss": 0.5, "accuracy": 1.0}
    log.add(4, loss=0.25)
    log.writer.flush()
    assert log.writer.flush() == {}
    assert log.points() == [("loss", 3, 0.5), ("accuracy", 3, 1.0), ("loss", 4, 0.25)]


def test_a_tensor_is_read_at_the_flush_and_not_before(log):
    """A tensor on the meta device has no value to read: only the flush may fail on it."""
    log.add(1, loss=torch.ones((), device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        log.writer.flush()


def test_a_callback_may_change_its_tensor_after_logging_it(log):
    total = torch.tensor([2.0], requires_grad=True)
    log.add(1, loss=total)
    with torch.no_grad():
        total.zero_()
    assert log.writer.flush() == {"loss": 2.0}


def test_numbers_of_all_kinds_keep_their_value_and_order(log):
    values = {"a": torch.tensor(2**40 + 1), "b": 0.1, "c": torch.tensor(True), "d": torch.tensor(0.1), "e": 7}
    log.add(1, **values)
    flushed = log.writer.flush()
    assert list(flushed.items()) == [("a", 2.0**40 + 1), ("b", 0.1), ("c", 1.0), ("d", values["d"].item()), ("e", 7.0)]
    assert all(type(value) is float for value in flushed.values())


def test_an_array_is_logged_as_it_was(log):
    total = np.array(2.0)
    log.add(1, loss=total)
    total += 1
    assert log.writer.flush() == {"loss": 2.0}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.zeros(2), r"a float32 tensor of shape \(2,\)"),
        (torch.tensor(1j), r"a complex64 tensor of shape \(\)"),
        (np.zeros(2), "ndarray array"),
        ("0.5", "str '0.5'"),
        (None, "NoneType None"),
        (10**400, "int 1000"),
    ],
)
def test_what_is_not_a_number_is_refused_at_once(log, value, found):
    log.add(1, source="mine")
    with pytest.raises(KsuitError, match=f"callbacks.mine: 'loss' has to be a number, not {found}"):
        log.writer.add_scalar("loss", value)


def test_threads_that_log_lose_nothing(log):
    log.counter.update = 1
    threads = [Thread(target=lambda n=n: [log.add(1, **{f"a{n}/{i}": 1.0}) for i in range(500)]) for n in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        log.writer.flush()
    log.writer.flush()
    assert len({key for key, _, _ in log.points()}) == len(log.points()) == 2000


@pytest.mark.parametrize("is_flushed", [False, True])
def test_a_key_logged_twice_names_both_callbacks(log, is_flushed):
    log.add(5, source="loss", **{"loss/test": 1.0})
    if is_flushed:
        log.writer.flush()
    with pytest.raises(KsuitError, match=r"callbacks.mine: 'loss/test' is logged twice at update 5, .*callbacks.loss"):
        log.add(5, source="mine", **{"loss/test": 1.5})


@pytest.mark.parametrize("is_flushed", [False, True])
@pytest.mark.parametrize(("value", "again"), [(1.0, torch.tensor(1.0)), (torch.tensor([2]), 2), (nan, np.array(nan))])
def test_the_same_value_logged_again_is_the_same_point(log, is_flushed, value, again):
    log.add(5, source="often", **{"loss/test": value})
    if is_flushed:
        log.writer.flush()
    log.add(5, source="epoch", **{"loss/test": again})
    log.writer.flush()
    assert len(log.points()) == 1
    assert log.writer.flush() == {}


def test_a_key_may_come_again_at_the_next_update(log):
    for update in (5, 6):
        log.add(update, loss=1.0)
        log.writer.flush()
    assert len(log.points()) == 2


def test_a_key_that_the_tracker_refuses_is_refused_at_once(log):
    with pytest.raises(ConfigError, match="callbacks.a: metric 'aaaa.*not 300"):
        log.add(1, **{"a" * 300: 1.0})


def test_points_that_are_known_are_not_written_again(tmp_path):
    known = {("loss", 1), ("loss", 2)}
    log = Log(tmp_path / "metrics.jsonl", lambda key, step: (key, step) in known)
    for update in (1, 2, 3):
        log.add(update, loss=1.0, accuracy=0.5)
        assert log.writer.flush() == {"loss": 1.0, "accuracy": 0.5}
    assert log.points() == [("accuracy", 1, 0.5), ("accuracy", 2, 0.5), ("loss", 3, 1.0), ("accuracy", 3, 0.5)]
    log.journal.close()


def test_what_is_discarded_is_not_written_and_may_be_logged_again(log):
    log.add(0, size=1.0)
    log.writer.discard()
    assert log.writer.flush() == {} and log.points() == []
    log.add(0, size=1.0)
    assert log.writer.flush() == {"size": 1.0}


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_values_that_are_no_numbers_are_written(log, value):
    log.add(1, loss=value, other=torch.tensor(value))
    log.writer.flush()
    written = [point[2] for point in log.points()]
    assert [math.isnan(item) if math.isnan(value) else item == value for item in written] == [True, True]


def test_the_summary_holds_the_last_and_the_best_value(log):
    for update, (loss, accuracy) in enumerate([(nan, 0.1), (0.5, 0.9), (0.25, 0.2), (0.75, nan)], start=1):
        log.add(update, loss=loss, accuracy=accuracy, rate=loss)
        log.writer.flush()
    summary = log.writer.summary
    assert summary["loss"] == Summary("lower", 0.75, 4, 0.25, 3)
    assert (summary["accuracy"].best, summary["accuracy"].best_step) == (0.9, 2)
    assert (summary["rate"].last, summary["rate"].best) == (0.75, None)


def test_the_summary_is_rebuilt_from_what_was_recorded(log):
    for update, loss in enumerate([0.5, 0.25, 0.75], start=1):
        log.add(update, loss=loss)
        log.writer.flush()
    other = LogWriter(log.journal, log.counter, MetricPropertyProvider(), check_key, lambda key, step: False, Path())
    other.summarize(point for points, _ in log.journal.read() for point in points)
    assert other.summary == log.writer.summary


def test_what_a_tracker_cannot_be_asked_about_is_recorded(tmp_path):
    def check_key(key):
        raise TrackerError("the recorder process has died 4 times")

    log = Log(tmp_path / "metrics.jsonl", check_key=check_key)
    log.add(1, loss=0.5)
    log.writer.flush()
    assert log.points() == [("loss", 1, 0.5)]
    log.journal.close()


def test_a_metric_is_also_a_line_of_the_callbacks_logger(log, caplog):
    caplog.set_level(logging.INFO)
    logger = logging.getLogger("callbacks.mine")
    log.writer.add_scalar("accuracy", torch.tensor(0.98765), logger, ".2f")
    log.writer.add_scalar("loss", 0.123456, logger)
    assert caplog.messages == ["accuracy: 0.99", "loss: 0.1235"]  # a callback that fails next has shown them
    log.writer.flush()
    assert len(caplog.messages) == 2


def test_what_was_flushed_is_in_the_file_after_writing_the_rest(log):
    log.add(1, loss=0.5)
    log.writer.flush()
    log.writer.write_rest()
    assert '"loss":0.5' in log.journal.path.read_text()


def test_keys_of_a_block_have_its_postfix(log, caplog):
    caplog.set_level(logging.INFO)
    writer, logger = log.writer, logging.getLogger("a")
    with writer.postfix("ema"):
        writer.add_scalar("loss", 1.0, logger=logger)
        with writer.postfix(""), writer.postfix("0.99"):
            writer.add_scalar("loss", 2.0)
            writer.add_text("note", "well done", logger=logger)
    with pytest.raises(ValueError), writer.postfix("lost"):
        raise ValueError
    writer.add_scalar("loss", 3.0)
    assert writer.flush() == {"loss/ema": 1.0, "loss/ema/0.99": 2.0, "loss": 3.0}
    assert caplog.messages == ["loss/ema: 1", "note/ema/0.99: well done"]
    (path,) = (log.journal.path.parent / "artifacts" / "texts").rglob("*.txt")
    assert path.parent.name == "0.99" and path.read_text() == "well done"
