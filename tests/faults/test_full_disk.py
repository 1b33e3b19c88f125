"""A full disk in the middle of a run costs checkpoints while it is full, and nothing else."""

import sqlite3
import subprocess
import threading
import time

import pytest
from command import (
    SMALL,
    checkpoint_bytes,
    journal,
    ksuit,
    last_step,
    mlflow_points,
    read_until,
    recorders_of,
    run_dir,
    start,
    wait_until,
)
from pausing import make_project
from preloaded import start as start_quickly

# Without the evaluation of the best checkpoint, which may be one that was lost to the full disk.
ARGUMENTS = (
    *(*SMALL, "model=mlp", "model.hidden_dims=[400]", "checkpoint=every_100_updates", "seed=3"),
    "callbacks=[ema,accuracy,loss,best_checkpoint]",
)
LENGTH = 200


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder):
    with open(folder / "filler", "ab", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 4096)
        except OSError:
            pass


def keep_full(folder, process):
    """Fill it again and again: checkpoints that were on their way make room."""
    while process.poll() is None:
        fill(folder)
        time.sleep(0.005)


def end(process, status):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    assert "Traceback" not in output and "Logging error" not in output, output
    return output


def test_the_run_continues_and_nothing_is_missing_in_the_end(tmp_path, small_disk):
    outputs, reference = small_disk / "outputs", tmp_path / "reference"
    arguments = (*ARGUMENTS, f"trainer.max_epochs={LENGTH}")
    process = start(outputs, *arguments)
    wait_until(lambda: last_step(outputs) >= 150, process)
    fill(small_disk)
    said = read_until(process, "could not be written")
    if "metrics cannot be written" not in said:  # a checkpoint that was on its way has made room since
        fill(small_disk)
        said += read_until(process, "metrics cannot be written")
    (small_disk / "filler").unlink()
    output = said + end(process, 0)
    assert "tries again at the next interval" in output
    assert "metrics can be written again" in output
    ksuit(reference, *arguments)
    assert journal(run_dir(outputs)) == journal(run_dir(reference)) == mlflow_points(outputs)
    last = {name: file for name, file in checkpoint_bytes(run_dir(reference)).items() if f"E{LENGTH}_" in name}
    assert last.items() <= checkpoint_bytes(run_dir(outputs)).items()


def test_a_run_that_ends_on_a_full_disk_fails_and_can_be_resumed(tmp_path, small_disk):
    outputs, reference = small_disk / "outputs", tmp_path / "reference"
    arguments = (*ARGUMENTS, "trainer.max_epochs=40", "+checkpoint.room_timeout_s=1")
    process = start(outputs, *arguments)
    wait_until(lambda: last_step(outputs) >= 150, process)
    keeper = threading.Thread(target=keep_full, args=(small_disk, process), daemon=True)
    keeper.start()
    output = end(process, 2)
    keeper.join()
    assert "error: the checkpoint could not be written" in output
    assert output.splitlines()[-1].endswith(f"resume={run_dir(outputs).name}")
    (small_disk / "filler").unlink()
    assert not list(run_dir(outputs).glob("artifacts/checkpoints/.*"))
    ksuit(outputs, "resume=last")
    ksuit(reference, *arguments)
    assert journal(run_dir(outputs)) == journal(run_dir(reference)) == mlflow_points(outputs)


def test_a_run_that_is_killed_for_a_full_disk_is_killed_for_its_tracker_elsewhere(tmp_path, small_disk):
    project, database = make_project(tmp_path / "project"), tmp_path / "mlflow.db"
    (project / "armed").touch()
    arguments = ("model=pauses", "model.pauses_at=30", f"tracker.uri=sqlite:///{database}")
    process = start_quickly(small_disk / "outputs", *arguments, cwd=project)
    read_until(process, "paused")
    (recorder,) = recorders_of(process.pid)
    fill(small_disk)
    process.kill()
    process.communicate()
    recorder.wait(20)
    with sqlite3.connect(database) as connection:
        ends = list(connection.execute("select status, end_time is not null from runs"))
        exits = list(connection.execute("select value from tags where key = 'ksuit.exit'"))
    assert (ends, exits) == ([("KILLED", 1)], [("SIGKILL",)])
