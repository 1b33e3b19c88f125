"""The command line on two ranks: what one process would record, also after signals, kills and mistakes."""

import signal
import time

import pytest
from command import checkpoint_bytes, journal, mlflow_points, query, run_dir
from pausing import make_project
from ranks import Commands, ksuit_on_ranks

from ksuit_runner.checkpoint.folders import names
from ksuit_runner.counter import Progress
from ksuit_runner.paths import PathProvider
from ksuit_runner.system.run_lock import RunLock

GIVEN = (
    *("model=pauses", "model.pauses_at=24", "trainer.max_epochs=3", "trainer.accumulation_steps=2"),
    *("callbacks=[accuracy,output_statistics,ema,best_checkpoint]", "checkpoint.keep_last=9"),
    *("+checkpoint.every_n_updates=8", "data.num_workers=1", "strategy=ddp"),
)


def wait_until_paused(commands):
    deadline = time.monotonic() + 60
    while not any("paused" in rank.output() for rank in commands.ranks):  # the other one waits for it
        assert time.monotonic() < deadline and all(rank.is_alive() for rank in commands.ranks), commands.output()
        time.sleep(0.02)


@pytest.mark.soak
def test_interrupted_killed_and_resumed_ranks_record_what_one_process_does(tmp_path):
    project, one, two = make_project(tmp_path / "project"), tmp_path / "one", tmp_path / "two"
    ksuit_on_ranks(one, 1, *GIVEN, cwd=project)
    armed = project / "armed"

    # A signal to one of them, in the middle of an update: all finish it.
    armed.touch()
    with Commands(two, 2, *GIVEN, cwd=project) as commands:
        wait_until_paused(commands)
        commands.ranks[1].send_signal(signal.SIGTERM)
        armed.unlink()
        assert commands.wait() == [128 + signal.SIGTERM] * 2, commands.output()
        assert "status  killed" in commands.output()
    assert query(two, "select status from runs") == [("KILLED",)]
    paths = PathProvider(two, run_dir(two).name)
    saved = names(paths)
    assert max(Progress.parse(name).update for name in saved) == 24  # one of the interval, as of an undisturbed run

    # Another one is resumed by nobody while it is alive, and two ranks say so once.
    with RunLock(paths.lock):
        output = ksuit_on_ranks(two, 2, "resume=last", status=2, cwd=project)
    assert output.count("error:") == 1 and "still running" in output

    # One of them is killed: the other saves nothing alone.
    armed.touch()
    with Commands(two, 2, "resume=last", cwd=project) as commands:
        wait_until_paused(commands)
        commands.ranks[1].kill()
        armed.unlink()
        assert commands.wait() == [1, -signal.SIGKILL], commands.output()
        assert "rank 1" in commands.output() and "nothing is saved" in commands.output()
    later = [Progress.parse(name) for name in names(paths) if name not in saved]
    assert later and not any(progress.update % 8 for progress in later)  # those of the interval
    assert query(two, "select status from runs") == [("FAILED",)]

    # One process goes on with what both have begun.
    ksuit_on_ranks(two, 1, "resume=last", cwd=project)
    assert journal(run_dir(two)) == journal(run_dir(one))
    assert mlflow_points(two) == mlflow_points(one)
    assert checkpoint_bytes(run_dir(two)) == checkpoint_bytes(run_dir(one))

    # Evaluated by two ranks, it is what it was.
    ksuit_on_ranks(two, 2, "evaluate=last", cwd=project)
    found = journal(run_dir(two))
    end = max(step for _, step in found)
    evaluated = {key for key, step in found if key.startswith("eval/") and step == end}
    assert "eval/accuracy/validation/ema" in evaluated
    assert all(found[key, end] == found[key.removeprefix("eval/"), end] for key in evaluated)
