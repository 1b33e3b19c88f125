"""A search by Optuna: what it comes up with, which trials it ends early, and that a kill changes nothing of it."""

import signal
import time
from importlib.util import find_spec

import pytest
from command import REPOSITORY, checkpoint_bytes, journal, query
from preloaded import ksuit, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("optuna") is None, reason="optuna is not installed: pip install 'ksuit_runner[optuna]'"
    ),
]
QUICK = ("sweep.samples=9", "trainer.max_epochs=5", "default_callbacks=none", "callbacks.prune.min_trials=3")


def trials(output_dir):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (file,) = output_dir.glob("sweeps/*/optuna.db")
    study = optuna.load_study(study_name=file.parent.name, storage=f"sqlite:///{file}")
    return [
        (trial.number, trial.params, trial.value, trial.state.name, trial.intermediate_values, trial.user_attrs)
        for trial in study.get_trials()
    ]


def jobs_of(output_dir):
    if not (output_dir / "mlflow.db").exists():
        return {}
    rows = query(output_dir, "select value, run_uuid from tags where key = 'ksuit.job' order by cast(value as int)")
    return {int(job): output_dir / "runs" / run_id for job, run_id in rows}


def kill_in(job, update, process, output_dir):
    deadline = time.monotonic() + 200
    while True:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        directory = jobs_of(output_dir).get(job)
        file = directory / "metrics.jsonl" if directory else None
        if file and file.exists() and f'"s":{update},' in file.read_text():
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_search_that_is_killed_continues_with_the_same_trials(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = ksuit(whole, "sweep=optuna", *QUICK)
    kill_in(5, 20, start(killed, "sweep=optuna", *QUICK), killed)
    output = ksuit(killed, "resume=optuna")
    assert "job 5/9" not in output and "job 6/9  starts" in output

    found = trials(whole)
    assert trials(killed) == found
    assert [trial[0] for trial in found] == list(range(9))
    states = [trial[3] for trial in found]
    assert set(states) <= {"COMPLETE", "PRUNED"} and "COMPLETE" in states
    assert "finished" in expected.splitlines()[-9].split(), expected  # the best one
    one, other = jobs_of(whole), jobs_of(killed)
    logs = "".join(path.read_text() for path in (whole / "runs").glob("*/run.log"))
    assert expected.count("  pruned  ") == 2 * states.count("PRUNED") == 2 * logs.count("worse than the median")
    assert list(one) == list(other) == list(range(9))
    for job, directory in one.items():
        assert journal(directory) == journal(other[job])
    for job in (4, 5, 8):
        assert checkpoint_bytes(one[job]) == checkpoint_bytes(other[job])


def test_a_run_that_is_no_trial_is_never_ended(tmp_path):
    output = ksuit(
        tmp_path, "model=linear", "callbacks=[accuracy,prune]", "objective=accuracy/validation", "trainer.max_epochs=1"
    )
    assert "finished" in output and "stops" not in output
    assert (REPOSITORY / "conf" / "callbacks" / "prune.yaml").is_file()
