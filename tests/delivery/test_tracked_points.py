import logging
import os

import pytest

from ksuit_runner.delivery.tracked_points import copy_history, open_journal, write_points
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.point import Point
from ksuit_runner.tracker.noop import NoopTracker

POINTS = [Point(key, step / 7, step, 1000 + step) for step in range(1, 6) for key in ("a", "b/c")]


class Store(NoopTracker):
    """A tracker that was sent some points, and may be away."""

    def __init__(self, points, is_away=False):
        super().__init__()
        self.points, self.is_away = points, is_away

    def last_steps(self, run_id=None):
        if self.is_away:
            raise TrackerError("MLflow cannot be reached")
        return {key: 5 for key in {point.key for point in self.points}}

    def history(self, key, run_id=None):
        return [point for point in self.points if point.key == key]


@pytest.fixture
def paths(tmp_path):
    """A run of five updates, all of whose points were sent."""
    paths = PathProvider(tmp_path, "run00000")
    journal = Journal(paths.journal)
    write_points(journal, POINTS)
    journal.close()
    paths.journal_sent.write_text(str(journal.size))
    return paths


def points(journal):
    return [point for line, _ in journal.read() for point in line]


def flip(paths, line):
    lines = paths.journal.read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[line])
    damaged[30] ^= 1
    paths.journal.write_bytes(b"".join([*lines[:line], damaged, *lines[line + 1 :]]))


def cut(paths, line):
    os.truncate(paths.journal, paths.journal.read_bytes().find(b"\n") + 1)


def lose(paths, line):
    paths.journal.unlink()


def restore(paths, line):
    """Put an earlier copy of the folder in its place, as a backup does."""
    cut(paths, line)
    paths.journal_sent.write_text(str(paths.journal.stat().st_size))


@pytest.mark.parametrize("line", [0, 2, 4])
@pytest.mark.parametrize("damage", [flip, cut, lose, restore])
def test_what_a_damaged_journal_lacks_is_taken_from_the_tracker(paths, damage, line):
    damage(paths, line)
    for _ in range(2):
        journal = open_journal(paths, Store(POINTS))
        assert sorted(points(journal)) == sorted(POINTS)
        journal.close()


def test_the_order_of_a_completed_journal_does_not_matter(paths, caplog):
    paths.journal.unlink()
    journal = Journal(paths.journal)
    write_points(journal, POINTS[4:] + POINTS[:4])
    journal.close()
    open_journal(paths, Store(POINTS)).close()
    assert not caplog.records


def test_what_the_tracker_does_not_have_costs_a_line(paths, caplog):
    flip(paths, 2)
    with caplog.at_level(logging.WARNING):
        journal = open_journal(paths, Store(POINTS[:4]))
    assert points(journal) == POINTS[:4] + POINTS[6:]
    assert "0 metric points that the journal lacked" in caplog.text
    journal.close()


@pytest.mark.parametrize("damage", [flip, cut, lose])
def test_nothing_is_computed_again_while_the_tracker_cannot_be_asked(paths, damage):
    """What is in the damaged part may be recorded, and would be there twice."""
    damage(paths, 2)
    with pytest.raises(TrackerError, match=r"metrics.jsonl is damaged or lost, .*: MLflow cannot be reached"):
        open_journal(paths, Store(POINTS, is_away=True))


def test_a_whole_journal_needs_no_tracker(paths):
    content = paths.journal.read_bytes()
    paths.journal.write_bytes(content + b'{"c":"01')  # as a kill leaves it
    journal = open_journal(paths, Store(POINTS, is_away=True))
    assert points(journal) == POINTS and paths.journal.read_bytes() == content
    journal.close()


@pytest.mark.parametrize("damage", [None, flip, lose])
def test_a_fork_begins_with_the_whole_history(paths, damage, tmp_path):
    if damage:
        damage(paths, 1)
    fork = Journal(tmp_path / "fork")
    copy_history(paths, fork, Store(POINTS, is_away=damage is None), update=3)
    assert sorted(points(fork)) == sorted(POINTS[:6])
    fork.close()


def test_a_fork_of_a_damaged_history_says_what_is_missing(paths, tmp_path, caplog):
    flip(paths, 1)
    fork = Journal(tmp_path / "fork")
    with caplog.at_level(logging.WARNING):
        copy_history(paths, fork, Store(POINTS, is_away=True), update=3)
    assert points(fork) == POINTS[:2] + POINTS[4:6]
    assert "are missing: MLflow cannot be reached" in caplog.text
    fork.close()
