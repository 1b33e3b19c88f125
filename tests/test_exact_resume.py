"""A run that is killed and resumed is, bit for bit and point for point, the run that was never killed."""

import shutil
import signal

import pytest
from command import (
    checkpoint_bytes,
    journal,
    last_step,
    lose_machine,
    mlflow_points,
    query,
    run_dir,
    stop_at,
    wait_until,
)
from preloaded import ksuit, start

# Dropout draws in the model; an odd batch size leaves a smaller last one; several accumulation steps.
HARD = (
    "model=mlp",
    "model.dropout=0.3",
    "data.batch_size=50",
    "data.drop_last=false",
    "trainer.accumulation_steps=3",
    "callbacks.ema.decays=[0.9,0.99]",
    "callbacks.best_checkpoint.metric_key=loss/validation",
    "tracker=noop",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed")
    ksuit(output_dir, *HARD)
    return run_dir(output_dir)


def assert_same(killed, reference):
    assert checkpoint_bytes(killed) == checkpoint_bytes(reference)
    assert journal(killed) == journal(reference)


def test_default_run_killed_in_an_epoch_is_the_same_in_mlflow(tmp_path):
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    ksuit(reference)
    process = start(killed)
    wait_until(lambda: last_step(killed) >= 170, process)
    lose_machine(process)
    assert query(killed, "select status from runs") == [("RUNNING",)]
    assert run_dir(killed).name[:8] in (listed := ksuit(killed, "list=1")) and "killed" in listed
    assert query(killed, "select status from runs") == [("KILLED",)]
    output = ksuit(killed, f"resume={run_dir(killed).name}")
    assert "starts from checkpoint E" in output
    assert checkpoint_bytes(run_dir(killed)) == checkpoint_bytes(run_dir(reference))
    assert mlflow_points(killed) == mlflow_points(reference)
    assert query(killed, "select status from runs") == [("FINISHED",)]


def test_killed_several_times_with_other_numbers_of_workers(tmp_path, undisturbed):
    workers = [0, 2, 1, 0]
    for update, number in zip((40, 200, 420), workers[:-1], strict=True):
        request = () if update == 40 else ("resume=last",)
        process = start(tmp_path, *(request or HARD), f"data.num_workers={number}")
        stop_at(process, tmp_path, update)
    ksuit(tmp_path, "resume=last", f"data.num_workers={workers[-1]}")
    assert_same(run_dir(tmp_path), undisturbed)


def test_killed_before_the_first_checkpoint_starts_from_its_beginning(tmp_path, undisturbed):
    process = start(tmp_path, *HARD)
    stop_at(process, tmp_path, update=0)
    shutil.rmtree(run_dir(tmp_path) / "artifacts" / "checkpoints", ignore_errors=True)  # had one been written by then
    ksuit(tmp_path, "resume=last")
    assert_same(run_dir(tmp_path), undisturbed)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_update_and_the_run_continues_from_there(tmp_path, undisturbed, number, status):
    process = start(tmp_path, *HARD)
    output = stop_at(process, tmp_path, 100, number)
    assert process.returncode == status
    command = f"python -m ksuit_runner output_dir={tmp_path} resume={run_dir(tmp_path).name}"
    assert output.splitlines()[-1].endswith(command)
    assert "killed" in output
    ksuit(tmp_path, "resume=last")
    # Interrupted between two epochs' ends it has left one checkpoint more, which retention may have removed since.
    ours, reference = checkpoint_bytes(run_dir(tmp_path)), checkpoint_bytes(undisturbed)
    assert reference.items() <= ours.items()
    assert journal(run_dir(tmp_path)) == journal(undisturbed)


def test_outputs_copied_to_another_path_are_resumed_there(tmp_path, undisturbed):
    here, there = tmp_path / "here", tmp_path / "there" / "outputs"
    process = start(here, *HARD)
    stop_at(process, here, update=150)
    shutil.copytree(here, there)
    shutil.rmtree(here)
    ksuit(there, "resume=last")
    assert_same(run_dir(there), undisturbed)
    assert not here.exists()


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, undisturbed):
    process = start(tmp_path, *HARD)
    stop_at(process, tmp_path, update=150)
    newest = max(
        (run_dir(tmp_path) / "artifacts/checkpoints").glob("E*"), key=lambda path: int(path.name.split("_")[1][1:])
    )
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    output = ksuit(tmp_path, "resume=last")
    assert newest.name in output and "model.safetensors is not what was written" in output
    assert_same(run_dir(tmp_path), undisturbed)
