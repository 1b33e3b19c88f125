import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ksuit_runner.delivery.metric_sender import MetricSender, Shipment, read_offset
from ksuit_runner.errors import TrackerError
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.point import LoggedFile, Point
from ksuit_runner.tracker.noop import NoopTracker


class AtOnce(NoopTracker):
    """Receives points, whoever sends them."""

    def check_owner(self) -> None:
        pass


class ListTracker(AtOnce):
    """Keeps what it gets in memory; fails while it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[Point]] = []
        self.failing = False
        self.failures = 0
        self.has_failed = threading.Event()

    def log_points(self, points: Sequence[Point]) -> None:
        if self.failing:
            self.failures += 1
            self.has_failed.set()
            raise TrackerError("the server is away")
        self.batches.append(list(points))

    @property
    def points(self) -> list[Point]:
        return [point for batch in self.batches for point in batch]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "metrics.jsonl")


def _send_all(sender: MetricSender) -> None:
    assert sender.flush(30) and sender.pending() == 0
    sender.close()


def _written(journal: Journal) -> list[Point]:
    return [point for points, _ in journal.read() for point in points]


def test_sends_everything_in_order(journal: Journal, tmp_path: Path) -> None:
    tracker = ListTracker()
    sender = MetricSender(journal, tmp_path / "sent", tracker, interval_s=60)
    for step in range(5):
        journal.append(step, {"a": step, "b": -step})
    assert sender.pending() == 10
    begun = time.monotonic()
    assert sender.flush(30)
    assert time.monotonic() - begun < 20  # it does not wait for its time-out
    journal.append(5, {"a": 5})
    _send_all(sender)
    assert tracker.points == _written(journal)
    assert int((tmp_path / "sent").read_text()) == journal.size


def test_points_are_sent_though_a_full_disk_does_not_take_how_many(journal: Journal, tmp_path: Path) -> None:
    tracker, sent = ListTracker(), tmp_path / "disk" / "sent"  # whose folder is not there yet
    shipment = Shipment(journal, sent, tracker)
    for step in range(3):
        journal.append(step, {"a": step})
        assert shipment.send() == 1
    assert tracker.points == _written(journal) and shipment.is_complete
    sent.parent.mkdir()
    assert shipment.send() == 0
    assert read_offset(sent) == journal.size


def test_looks_at_the_journal_by_itself(journal: Journal, tmp_path: Path) -> None:
    tracker = ListTracker()
    arrived = threading.Event()
    tracker.log_points = lambda points: arrived.set()  # type: ignore[method-assign]
    sender = MetricSender(journal, tmp_path / "sent", tracker, interval_s=0.01)
    journal.append(1, {"a": 1})
    assert arrived.wait(30)
    _send_all(sender)


def test_does_not_look_at_the_journal_all_the_time(journal: Journal, tmp_path: Path) -> None:
    tracker, looks = AtOnce(), []
    tracker.deliver = lambda: looks.append(1)  # type: ignore[method-assign]
    sender = MetricSender(journal, tmp_path / "sent", tracker)
    time.sleep(0.05)
    assert len(looks) < 10
    _send_all(sender)


def test_batches_end_with_a_line_and_hold_at_most_1000(journal: Journal, tmp_path: Path) -> None:
    for step in range(5):
        journal.append(step, {f"k{i}": i for i in range(300)})
    journal.append(5, {f"k{i}": i for i in range(2500)})
    journal.append(6, {"k0": 0})
    journal.append(7, {f"k{i}": i for i in range(499)})
    tracker = ListTracker()
    _send_all(MetricSender(journal, tmp_path / "sent", tracker))
    assert [len(batch) for batch in tracker.batches] == [900, 600, 1000, 1000, 1000]
    assert tracker.points == _written(journal)


def test_a_batch_that_was_sent_is_not_sent_again_because_the_next_one_fails(journal: Journal, tmp_path: Path) -> None:
    class FailingTracker(AtOnce):
        def log_points(self, points: Sequence[Point]) -> None:
            if points[0].step == 2:
                raise TrackerError("the server is away")

    journal.append(1, {f"k{i}": i for i in range(1000)})
    journal.append(2, {"a": 2})
    shipment = Shipment(journal, tmp_path / "sent", FailingTracker())
    with pytest.raises(TrackerError):
        shipment.send()
    assert shipment.pending() == 1


def test_an_outage_is_said_once_and_loses_nothing(journal: Journal, tmp_path: Path, caplog) -> None:
    tracker = ListTracker()
    tracker.failing = True
    is_back = threading.Event()
    sender = MetricSender(journal, tmp_path / "sent", tracker, is_back.set, interval_s=0.01)
    journal.append(1, {"a": 1})
    assert tracker.has_failed.wait(30)
    while tracker.failures < 3:
        assert not sender.flush(0.01)
    journal.append(2, {"a": 2})
    assert sender.pending() == 2
    tracker.failing = False
    assert sender.flush(30) and is_back.wait(30)
    _send_all(sender)
    assert tracker.points == _written(journal)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "the server is away" in caplog.messages[0]
    assert "reached again" in caplog.messages[1]


def test_what_is_left_at_the_end_is_counted_and_sent_at_the_next_start(journal: Journal, tmp_path: Path) -> None:
    tracker = ListTracker()
    tracker.failing = True
    journal.append(1, {"a": 1, "b": 2})
    sender = MetricSender(journal, tmp_path / "sent", tracker)
    assert not sender.flush(0.1) and sender.pending() == 2
    sender.close()
    tracker.failing = False
    _send_all(MetricSender(journal, tmp_path / "sent", tracker))
    assert len(tracker.points) == 2


def test_a_hanging_tracker_does_not_hold_the_run(journal: Journal, tmp_path: Path) -> None:
    hanging, released, sent = threading.Event(), threading.Event(), []

    class HangingTracker(AtOnce):
        def log_points(self, points: Sequence[Point]) -> None:
            hanging.set()
            assert released.wait(60)
            sent.append(len(points))

    journal.append(1, {f"k{i}": i for i in range(1000)})
    journal.append(2, {"a": 2})
    sender = MetricSender(journal, tmp_path / "sent", HangingTracker())
    sender.notify()
    assert hanging.wait(30)
    assert not sender.flush(0.05) and sender.pending() == 1001
    sender.close()
    released.set()
    sender._thread.join(30)
    assert not sender._thread.is_alive() and sent == [1000]  # the next batch is that of the next start


def test_everything_is_sent_only_once_what_was_kept_back_is(journal: Journal, tmp_path: Path) -> None:
    class AwayTracker(AtOnce):
        def deliver(self) -> None:
            raise TrackerError("the server is away")

    sender = MetricSender(journal, tmp_path / "sent", AwayTracker(), interval_s=60)
    assert not sender.flush(0.01)
    sender.close()


def test_any_exception_of_a_tracker_stays_in_the_thread(journal: Journal, tmp_path: Path, caplog) -> None:
    class BrokenTracker(AtOnce):
        def log_points(self, points: Sequence[Point]) -> None:
            raise ZeroDivisionError("a bug")

    sender = MetricSender(journal, tmp_path / "sent", BrokenTracker(), interval_s=0.01)
    journal.append(1, {"a": 1})
    _wait_until_failing(sender)
    assert sender.pending() == 1
    sender.close()
    assert "ZeroDivisionError('a bug')" in caplog.text


def _wait_until_failing(sender: MetricSender) -> None:
    """Wait for the thread, which notes a failure a moment after the tracker did."""
    deadline = time.monotonic() + 30
    while not sender.is_failing and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sender.is_failing


class WholeTracker(ListTracker):
    """Keeps the order of everything that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.is_told = False

    @property
    def is_behind(self) -> bool:
        return not self.is_told

    def deliver(self) -> None:
        self.told.append("start")

    def log_points(self, points: Sequence[Point]) -> None:
        super().log_points(points)
        self.told.append("points")

    def deliver_end(self) -> None:
        self.told.append("end")
        self.is_told = True


def test_the_end_is_told_last_and_only_after_every_point(journal: Journal, tmp_path: Path) -> None:
    tracker = WholeTracker()
    sender = MetricSender(journal, tmp_path / "sent", tracker, interval_s=0.01)
    assert sender.flush(30)  # everything is sent, but the run continues
    tracker.failing = True
    journal.append(1, {"a": 1})
    assert not sender.finish(0.3)
    assert set(tracker.told) == {"start"}
    tracker.failing = False
    assert sender.finish(30)
    end = tracker.told.index("end")  # after which the thread keeps looking for something to do
    assert tracker.told[end - 1] == "points" and "points" not in tracker.told[end:]
    assert sender.pending() == 0
    sender.close()


def test_an_end_is_known_once_every_point_and_the_end_itself_are(journal: Journal, tmp_path: Path) -> None:
    tracker = ListTracker()
    tracker.failing = True
    journal.append(1, {"a": 1})
    sender = MetricSender(journal, tmp_path / "sent", tracker, interval_s=60)
    assert not sender.finish(0.01) and not tracker.is_behind
    tracker.failing = False
    assert sender.finish(30)
    sender.close()
    behind = WholeTracker()
    behind.deliver_end = lambda: None  # type: ignore[method-assign]
    sender = MetricSender(journal, tmp_path / "sent", behind, interval_s=60)
    assert sender.flush(30) and not sender.finish(0.01)
    sender.close()


def test_the_end_waits_for_points_that_come_while_others_are_sent(journal: Journal, tmp_path: Path) -> None:
    class Growing(WholeTracker):
        def log_points(self, points: Sequence[Point]) -> None:
            super().log_points(points)
            if points[0].step < 3:
                journal.append(points[0].step + 1, {"a": 1})

        def deliver_end(self) -> None:
            super().deliver_end()
            self.sent = self.points

    tracker = Growing()
    journal.append(1, {"a": 1})
    sender = MetricSender(journal, tmp_path / "sent", tracker, interval_s=0.01)
    assert sender.finish(30)
    sender.close()
    assert tracker.sent == _written(journal) and len(tracker.sent) == 3


def test_nothing_of_a_line_is_lost_that_is_sent_in_parts(journal: Journal, tmp_path: Path) -> None:
    class Failing(ListTracker):
        def log_points(self, points: Sequence[Point]) -> None:
            self.failing = len(self.batches) == 1 and not self.failures
            super().log_points(points)

    tracker = Failing()
    journal.append(1, {f"metric {number}": number for number in range(2500)})
    shipment = Shipment(journal, tmp_path / "sent", tracker)
    with pytest.raises(TrackerError):
        shipment.send()
    assert Shipment(journal, tmp_path / "sent", tracker).send() == 2500
    assert set(tracker.points) == set(_written(journal))


def test_files_are_sent_with_the_batch_that_they_are_in(journal: Journal, tmp_path: Path) -> None:
    class Files(ListTracker):
        def log_files(self, files: Sequence[LoggedFile]) -> None:
            self.files = [file.path for file in files]

    tracker = Files()
    journal.append(1, {"a": 1}, files={"image": "image.png"})
    journal.append(2, {f"metric {number}": number for number in range(1000)})
    Shipment(journal, tmp_path / "sent", tracker).send()
    assert tracker.files == ["image.png"] and len(tracker.batches) == 2


def test_who_waits_for_the_tracker_is_called_when_it_is_back(journal: Journal, tmp_path: Path) -> None:
    tracker = ListTracker()
    tracker.failing = True
    is_back = threading.Event()
    sender = MetricSender(journal, tmp_path / "sent", tracker, is_back.set, interval_s=0.01)
    journal.append(1, {"a": 1})
    _wait_until_failing(sender)
    assert not is_back.is_set()
    tracker.failing = False
    assert sender.flush(30)
    assert is_back.wait(30)
    sender.close()


def test_points_are_on_the_disk_before_they_are_sent(journal: Journal, tmp_path: Path, monkeypatch) -> None:
    """Else a power cut would lose what is recorded already, and it would be recorded again at another time."""
    done: list[str] = []
    tracker = ListTracker()
    monkeypatch.setattr(tracker, "log_points", lambda points: done.append(f"sent {points[-1].step}"))

    def sync() -> None:
        done.append("synced")
        if done == ["synced"]:
            Journal.append(journal, 2, {"a": 2})  # meanwhile, by the training thread: that is not on the disk

    monkeypatch.setattr(journal, "sync", sync)
    sender = MetricSender(journal, tmp_path / "sent", tracker, interval_s=60)
    journal.append(1, {"a": 1})
    assert sender.flush(30) and done == ["synced", "sent 1"]
    _send_all(sender)
    assert done == ["synced", "sent 1", "synced", "sent 2"]


def test_a_shipment_says_how_many_points_it_has_sent(journal: Journal, tmp_path: Path) -> None:
    journal.append(1, {"a": 1, "b": 1})
    journal.append(2, {"a": 2})
    shipment = Shipment(journal, tmp_path / "sent", ListTracker())
    assert (shipment.offset, shipment.send(), shipment.send()) == (0, 3, 0)
    journal.append(3, {"a": 3})
    shipment.is_cancelled.set()
    assert (shipment.send(), shipment.pending()) == (0, 1)


def test_continues_where_the_last_one_ended(journal: Journal, tmp_path: Path) -> None:
    tracker = ListTracker()
    journal.append(1, {"a": 1})
    _send_all(MetricSender(journal, tmp_path / "sent", tracker))
    journal.append(2, {"a": 2})
    _send_all(MetricSender(journal, tmp_path / "sent", tracker))
    assert [point.step for point in tracker.points] == [1, 2]


@pytest.mark.parametrize("content", ["", "x", "-3", "5"])
def test_without_a_usable_position_everything_is_sent_again(journal: Journal, tmp_path: Path, content: str) -> None:
    (tmp_path / "sent").write_text(content)
    journal.append(1, {"a": 1})
    tracker = ListTracker()
    _send_all(MetricSender(journal, tmp_path / "sent", tracker))
    assert tracker.points == _written(journal)


def test_a_position_that_is_missing_or_unreadable_is_the_beginning(tmp_path: Path) -> None:
    sent_path = tmp_path / "sent"
    assert read_offset(sent_path) == 0
    sent_path.write_text("x")
    assert read_offset(sent_path) == 0


def test_position_follows_a_journal_that_was_cut(journal: Journal, tmp_path: Path) -> None:
    journal.append(1, {"a": 1})
    cut = journal.size
    journal.append(2, {"a": 2})
    _send_all(MetricSender(journal, tmp_path / "sent", AtOnce()))
    os.truncate(journal.path, cut)
    journal.close()
    again, tracker = Journal(journal.path), ListTracker()
    sender = MetricSender(again, tmp_path / "sent", tracker)
    assert int((tmp_path / "sent").read_text()) == cut
    again.append(2, {"a": 2, "b": 3})
    _send_all(sender)
    assert [(point.key, point.step) for point in tracker.points] == [("a", 2), ("b", 2)]


def test_a_damaged_line_at_the_end_is_no_reason_to_wait(journal: Journal, tmp_path: Path) -> None:
    journal.append(1, {"a": 1})
    journal.append(2, {"a": 2})
    journal.close()
    content = bytearray(journal.path.read_bytes())
    content[-5] ^= 1
    journal.path.write_bytes(content)
    damaged, tracker = Journal(journal.path), ListTracker()
    sender = MetricSender(damaged, tmp_path / "sent", tracker)
    _send_all(sender)
    assert [point.step for point in tracker.points] == [1]
    assert int((tmp_path / "sent").read_text()) == damaged.size


_KILLED = """
import os, signal, sys
from pathlib import Path
from ksuit_runner.record.journal import Journal
from ksuit_runner.delivery.metric_sender import MetricSender

class FileTracker:
    def __getattr__(self, name):
        return lambda: None  # it has nothing but points to receive

    def log_points(self, points):
        with open("received", "a") as file:
            file.writelines(f"{point.step}\\n" for point in points)
        if points[-1].step >= 20:
            os.kill(os.getpid(), signal.SIGKILL)  # between receipt and acknowledgement

journal = Journal(Path("metrics.jsonl"))
sender = MetricSender(journal, Path("sent"), FileTracker(), interval_s=60)
for step in range(1, 31):
    journal.append(step, {"a": step})
    sender.flush(30)
"""


def test_killed_before_the_acknowledgement_sends_the_last_batch_again(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    killed = subprocess.run([sys.executable, "-c", _KILLED], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root})
    assert killed.returncode == -9
    received = [int(line) for line in (tmp_path / "received").read_text().split()]
    assert received == list(range(1, 21))
    journal, tracker = Journal(tmp_path / "metrics.jsonl"), ListTracker()
    _send_all(MetricSender(journal, tmp_path / "sent", tracker))
    assert [point.step for point in tracker.points] == [20]
