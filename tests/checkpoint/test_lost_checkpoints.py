import errno

import pytest

from ksuit_runner.checkpoint import lost_checkpoints
from ksuit_runner.checkpoint.lost_checkpoints import LostCheckpoints

FULL = OSError(errno.ENOSPC, "No space left on device")
AND_NOW = "; the run continues with the last good one, and tries again at the next interval"


@pytest.fixture
def said(caplog, monkeypatch, tmp_path):
    """Return what is logged while checkpoints come that are written or lost, one every second."""

    def log_of(*written):
        now = 0
        monkeypatch.setattr(lost_checkpoints, "monotonic", lambda: now)
        lost = LostCheckpoints(tmp_path)
        for is_written in written:
            lost.end() if is_written else lost.add(FULL)
            now += 1
        lost.close()
        return [f"{record.levelname} {record.getMessage()}".replace(str(tmp_path), "DIR") for record in caplog.records]

    return log_of


def test_the_first_loss_is_said_at_once_and_others_by_their_number_at_intervals(said):
    assert said(True, *[False] * 25, True, True) == [
        f"ERROR the checkpoint could not be written to DIR: {FULL}{AND_NOW}",
        f"ERROR 10 checkpoints could not be written to DIR: {FULL}{AND_NOW}",
        f"ERROR 10 checkpoints could not be written to DIR: {FULL}{AND_NOW}",
        "WARNING checkpoints can be written again, after 4 more were lost: DIR",
    ]


def test_nothing_is_said_of_checkpoints_that_are_written(said):
    assert said(True, True, True) == []


def test_a_disk_that_is_full_every_other_time_is_said_at_intervals_too(said):
    assert said(*[False, True] * 6) == [
        f"ERROR the checkpoint could not be written to DIR: {FULL}{AND_NOW}",
        "WARNING checkpoints can be written again: DIR",
        f"ERROR 5 checkpoints could not be written to DIR: {FULL}{AND_NOW}",
        "WARNING checkpoints can be written again: DIR",
    ]


def test_the_end_of_a_run_says_the_number_of_the_rest(said):
    assert said(*[False] * 8) == [
        f"ERROR the checkpoint could not be written to DIR: {FULL}{AND_NOW}",
        "ERROR 7 more checkpoints could not be written to DIR",
    ]
