"""Output that is lost: its reader leaves, the disk is full, it is closed, its encoding has not all characters."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import ksuit, mlflow_points, query, run_dir, start

from ksuit_runner.ui.lasting_output import LastingStream
from ksuit_runner.ui.logs import setup_logging
from ksuit_runner.ui.terminal import make_console


class Fails(io.StringIO):
    """Takes nothing as long as it is told to."""

    error: Exception | None = None

    def write(self, text):
        if self.error is not None:
            raise self.error
        return super().write(text)

    def flush(self):
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "full"), ValueError("closed"), BlockingIOError()])
def test_what_is_not_taken_is_left_out_and_what_follows_is_tried_again(error):
    stream = LastingStream(below := Fails())
    below.error = error
    print("lost", file=stream, flush=True)
    stream.writelines(["lost", "too"])
    below.error = None
    print("kept", file=stream, flush=True)
    assert below.getvalue() == "kept\n"


def test_characters_that_the_encoding_does_not_have_are_escaped():
    stream = LastingStream(io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"))
    print("↑ é ok", file=stream, flush=True)
    assert stream.buffer.getvalue() == b"\\u2191 \\xe9 ok\n"


def test_a_console_whose_reader_leaves_and_a_log_that_cannot_be_opened_raise_nothing(tmp_path):
    (tmp_path / "folder").touch()
    below = Fails()
    with setup_logging(tmp_path / "folder" / "run.log", make_console(file=below)) as logger:
        below.error = BrokenPipeError()
        logger.warning("lost")
        below.error = None
        logger.warning("kept \udcff")
    assert "lost" not in below.getvalue() and "kept" in below.getvalue()


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", ">/dev/full 2>/dev/full"])
def test_a_process_without_output_keeps_the_descriptors_of_it_from_its_files(closed, tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from ksuit_runner.ui.lasting_output import secure_output;"
        "secure_output(); secure_output(); print('x', flush=True); print('x', file=sys.stderr, flush=True);"
        f"file = open({str(tmp_path / 'mine')!r}, 'w'); os.system('echo printed'); sys.exit(file.fileno() < 3)"
    )
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, script])
    assert done.returncode == 0
    assert (tmp_path / "mine").read_bytes() == b""


LEAVES = """
import sys

from ksuit_runner.callback_base import CallbackBase


class Leaves(CallbackBase):
    def __init__(self, update, **kwargs):
        super().__init__(**kwargs)
        self.update = update

    def _after_update(self, update_counter):
        print("printed", flush=True)
        if update_counter.update == self.update:
            sys.exit(0)
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "leaves.py").write_text(LEAVES)
    return tmp_path


def test_a_callback_that_ends_the_process_ends_its_run_as_failed(project):
    callback = ("callbacks=[]", "+callbacks.leaves._target_=leaves.Leaves", "+callbacks.leaves.update=7")
    output = ksuit(project / "outputs", "model=linear", *callback, status=1, cwd=project)
    assert "the run failed: SystemExit(0)" in output and "hook after_update" in output
    assert query(project / "outputs", "select status from runs") == [("FAILED",)]
    assert list((run_dir(project / "outputs") / "artifacts" / "checkpoints").glob("E*_U7_*"))


def test_a_run_whose_reader_leaves_continues_to_its_end(project, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    callback = ("callbacks=[accuracy]", "+callbacks.leaves._target_=leaves.Leaves", "+callbacks.leaves.update=0")
    process = start(project / "outputs", "model=linear", "trainer.max_epochs=2", *callback, cwd=project)
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(120) == 0
    assert query(project / "outputs", "select status from runs") == [("FINISHED",)]
    assert mlflow_points(project / "outputs").keys() >= {("accuracy/validation", 20), ("accuracy/validation", 40)}
    assert "accuracy/validation" in (Path(run_dir(project / "outputs")) / "run.log").read_text()
    assert os.listdir(run_dir(project / "outputs")).count("lock.json") == 0
