"""What the file system refuses outside of training is explained in a line, and changes nothing that is done."""

import errno
import os

import pytest
from preloaded import ksuit

from ksuit_runner.distributed.world import World
from ksuit_runner.engine.closing import closing
from ksuit_runner.engine.meeting import Meeting
from ksuit_runner.engine.outcome import RunOutcome
from ksuit_runner.errors import StorageError, files_explained
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.tracker.base import EndStatus


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ESTALE, errno.EIO])
def test_an_error_names_the_file_and_the_reason(code):
    with pytest.raises(StorageError) as caught, files_explained():
        raise OSError(code, os.strerror(code), "/data/run")
    assert str(caught.value) == f"/data/run: {os.strerror(code)}"
    assert caught.value.exit_status == 2


def test_a_lock_that_a_full_disk_does_not_take_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match=r"lock\.json: full$"), files_explained():
        RunLock(tmp_path / "lock.json").acquire()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_a_line_and_not_a_traceback(tmp_path):
    (tmp_path / "file").touch()
    said = ksuit(tmp_path / "file" / "outputs", "tracker=noop", "model=linear", status=2)
    assert said.splitlines()[-1] == f"error: output_dir: {tmp_path / 'file'}: it is a file, and not a folder"
    assert "Traceback" not in said


@pytest.mark.parametrize("broken", ["data", "record"])
def test_a_run_is_closed_as_what_it_is_whatever_closing_refuses(broken, caplog, tmp_path):
    closed = []

    class Data:
        def close(self):
            if broken == "data":
                raise ZeroDivisionError

    class Trainer:
        data_container = Data()

    class Record:
        def close(self, status, never_began):
            closed.append(status)
            raise OSError(errno.ESTALE, "stale")

    outcome = RunOutcome("run00000", tmp_path, EndStatus.FINISHED)
    with closing(Record(), Trainer(), outcome, Meeting(World())):
        pass
    expected = EndStatus.FAILED if broken == "data" else EndStatus.FINISHED
    assert closed == [expected] and outcome.status == expected
    assert isinstance(outcome.error, ZeroDivisionError) == outcome.exit_status == (broken == "data")
    assert "stale" in caplog.text
