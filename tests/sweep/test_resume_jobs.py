"""The jobs of a resumed sweep: which are skipped, waited for or delivered, and that a refusal changes nothing."""

import json
import os
import signal
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import pytest
from command import query
from preloaded import ksuit

from ksuit_runner.cli.start import start_stored
from ksuit_runner.config.differences import is_same
from ksuit_runner.delivery.delivered import Delivery
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.delivery.recording import Unsent
from ksuit_runner.errors import AliveError, ConfigError, ResumeError
from ksuit_runner.launchers.joblib import JoblibLauncher
from ksuit_runner.paths import PathProvider, SweepPaths
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.stored_run import Launch, add_to_index
from ksuit_runner.recorder.remote import RemoteRecording
from ksuit_runner.reports.show import show
from ksuit_runner.resume.request import Request
from ksuit_runner.sweep.build_plan import plan_sweep
from ksuit_runner.sweep.commands import resume_sweep, show_leaderboard, start_sweep
from ksuit_runner.sweep.job_runs import JOB_TAG, SWEEP_TAG, local_record, runs_of_jobs
from ksuit_runner.sweep.plan import read_plan, store_plan
from ksuit_runner.sweep.run_job import JobTask, run_job
from ksuit_runner.sweep.stored_sweep import find_sweep
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.tracker.base import EndStatus

TINY = ("model=linear", "trainer.max_epochs=1", "callbacks=[loss]", "default_callbacks=none")
SWEEP_ID = "a" * 32


def sweep_in(folder, *overrides):
    """Do a tiny sweep of two jobs in this process and return its files."""
    assert start_sweep([f"output_dir={folder}", *TINY, "seed=0,1", *overrides], "command").exit_status == 0
    (sweep,) = (folder / "sweeps").iterdir()
    return SweepPaths(folder, sweep.name)


def bytes_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def task_in(folder, index=0):
    launch = Launch("command", [], tags={SWEEP_TAG: SWEEP_ID, JOB_TAG: str(index)})
    config = {"tracker": {"_target_": "ksuit_runner.tracker.noop.NoopTracker"}}
    return JobTask(index, folder, SWEEP_ID, Path.cwd(), config, launch)


def add_run(folder, run_id, status):
    """Leave what a run of the first job leaves that has ended."""
    run = PathProvider(folder, run_id)
    run.run_dir.mkdir(parents=True)
    Outbox(run_id, "name", run_id, status=status).store(run)
    Delivery(run_id, 0, status).store(run)
    add_to_index(run, run_id, "name", "train", tags=task_in(folder).launch.tags)


def test_a_job_that_another_process_does_is_waited_for_and_not_done_again(tmp_path):
    paths = SweepPaths(tmp_path, SWEEP_ID)
    other = RunLock(paths.job_lock(0))
    other.acquire()
    paths.begun(0).parent.mkdir()
    paths.begun(0).touch()

    def finish():
        add_run(tmp_path, "of-the-other", "FINISHED")
        other.release()

    timer = threading.Timer(0.3, finish)
    timer.start()
    result = run_job(task_in(tmp_path))
    timer.join()
    assert (result.status, result.run_id) == ("FINISHED", "of-the-other")
    assert result.seconds >= 0.3
    assert runs_of_jobs(paths) == {0: "of-the-other"}
    assert not paths.job_lock(0).exists()


def test_a_signal_ends_the_wait_for_another_process(tmp_path):
    with RunLock(SweepPaths(tmp_path, SWEEP_ID).job_lock(0)):
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        result = run_job(task_in(tmp_path))
        timer.join()
    assert (result.status, result.signal, result.run_id) == ("KILLED", signal.SIGTERM, None)


def test_runs_are_matched_to_jobs_by_their_tags_whatever_the_clock_says(tmp_path, capsys):
    paths = sweep_in(tmp_path, "tracker=noop")
    plan = json.loads(paths.plan.read_text())
    paths.plan.write_text(json.dumps({**plan, "created": plan["created"] + 1e6}))  # the clock was set back since
    paths.ended.unlink()
    (tmp_path / "runs.jsonl").write_bytes(b"\xff torn\n")  # and the index was lost
    before = runs_of_jobs(paths)
    assert len(before) == 2
    capsys.readouterr()
    assert resume_sweep(paths, [f"output_dir={tmp_path}"]).exit_status == 0
    said = capsys.readouterr().out
    assert "starts" not in said
    assert "loss/validation" in said  # in the leaderboard
    assert runs_of_jobs(paths) == before and len(list((tmp_path / "runs").iterdir())) == 3


def test_what_a_killed_job_had_not_sent_is_delivered_by_the_resume(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(RemoteRecording, "finish", lambda *arguments: Unsent(1))  # killed after it has noted how it ended
        paths = sweep_in(tmp_path, "default_callbacks=standard", "tracker.close_timeout_s=0.1")
    runs = "from runs join tags on runs.run_uuid = tags.run_uuid and key = 'ksuit.job'"
    assert resume_sweep(paths, [f"output_dir={tmp_path}"]).exit_status == 0
    said = capsys.readouterr().out
    assert said.count("had ended; what the tracker lacked of it is sent") == 2 and "error" not in said
    assert query(tmp_path, f"select distinct status {runs}") == [("FINISHED",)]
    counts = [
        len(query(tmp_path, f"select key from {table} where run_uuid = '{run_id}'"))
        for table in ("metrics", "params")
        for run_id in runs_of_jobs(paths).values()
    ]
    assert counts[0] == counts[1] > 0 and counts[2] == counts[3] > 0
    assert resume_sweep(paths, [f"output_dir={tmp_path}"]).exit_status == 0
    assert "had ended" not in capsys.readouterr().out


def test_a_job_whose_best_model_is_not_listed_yet_is_not_delivered(tmp_path):
    run = PathProvider(tmp_path, "f" * 32)
    (run.checkpoints_dir / "E1_U2_S3").mkdir(parents=True)
    run.tags.write_text('{"best": "E1_U2_S3"}')
    Outbox(run.run_id, "name", run.run_id, listed={"best": ("loss/test",)}, status=EndStatus.FINISHED).store(run)
    delivery = Delivery(run.run_id, 0, EndStatus.FINISHED)
    for listed, is_delivered in (({}, False), ({"best": "checkpoints/E1_U2_S3"}, True)):
        msgspec.structs.replace(delivery, listed=listed).store(run)
        assert local_record(run, run.run_id).is_delivered == is_delivered


def test_a_refused_resume_changes_nothing(tmp_path, monkeypatch):
    paths = sweep_in(tmp_path, "tracker=noop")
    changes = [f"output_dir={tmp_path}", "sweep.retry=false"]
    before = bytes_in(tmp_path)
    with RunLock(paths.lock), pytest.raises(AliveError):
        resume_sweep(paths, [*changes, "launcher=joblib"])
    with pytest.raises(ConfigError, match="launcher: there is no 'joblb'"):
        resume_sweep(paths, [*changes, "launcher=joblb"])
    with pytest.raises(ResumeError, match="a sweep is resumed with the jobs that were planned"):
        resume_sweep(paths, [*changes, "optimizer.lr=1"])

    def open_none(launcher, sweep_paths):
        raise ConfigError("launcher.address: there is no cluster")

    monkeypatch.setattr(JoblibLauncher, "open", open_none)
    with pytest.raises(ConfigError, match="there is no cluster"):
        resume_sweep(paths, [*changes, "launcher=joblib"])
    assert bytes_in(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plan.json", b""),
        ("plan.json", b"{}"),
        ("plan.json", b"[1]"),
        ("plan.json", b"\xff\x00"),
        ("plan.json", b'{"name": 1'),
        ("plan.json", b"[" * 100_000),
        ("jobs.jsonl", b""),
        ("jobs.jsonl", b'{"index": 0, "combination": 3, "config": {}}\n'),
        ("jobs.jsonl", b"\xff\n"),
    ],
)
def test_a_damaged_sweep_is_an_error_for_itself_only(tmp_path, name, content):
    whole, damaged = (_planned(tmp_path, letter * 32, f"sweep-{letter}") for letter in "ab")
    (damaged.sweep_dir / name).write_bytes(content)
    (tmp_path / "sweeps" / "a copy.bak").mkdir()
    here = [f"output_dir={tmp_path}"]
    assert find_sweep("some-run", here) is None and find_sweep("x" * 32, here) is None
    assert find_sweep("sweep-a", here).sweep_id == find_sweep("aaaaaa", here).sweep_id == whole.sweep_id
    assert show_leaderboard("sweep-a", here) == 0
    for command in (resume_sweep, lambda paths, overrides: show_leaderboard(paths.sweep_id, overrides)):
        with pytest.raises(ResumeError, match=f"^sweep bbbbbbbb cannot be used: .*{name}.*$") as raised:
            command(find_sweep("b" * 32, here), here)
        assert len(str(raised.value)) < 400


def test_a_name_that_a_sweep_shares_with_a_run_is_not_taken_for_the_sweep(tmp_path):
    sweep, here = _planned(tmp_path, SWEEP_ID, "twin"), [f"output_dir={tmp_path}"]
    add_run(tmp_path, "b" * 32, "FINISHED")
    add_to_index(sweep, "b" * 32, "twin", "train", tags=task_in(tmp_path).launch.tags)
    assert find_sweep("twin", here).sweep_id == SWEEP_ID  # its jobs have its name
    for run_id in ("c" * 32, "d" * 32):
        PathProvider(tmp_path, run_id).run_dir.mkdir(parents=True)
        add_to_index(sweep, run_id, "twin", "train", tags={})
    for command in (show, lambda *given: start_stored(Request(Mode.RESUME, given[0]), given[1], "command")):
        with pytest.raises(ResumeError, match=f"a sweep and of a run; .* sweep is {SWEEP_ID}, .* run {'d' * 32}$"):
            command("twin", here)
    assert {find_sweep(id_, here).sweep_id for id_ in (SWEEP_ID, SWEEP_ID[:6])} == {SWEEP_ID}
    assert show_leaderboard("twin", here) == 0


def test_resuming_the_last_run_says_that_it_is_a_job_of_a_sweep(tmp_path):
    sweep = sweep_in(tmp_path, "tracker=noop")
    resumed = ksuit(tmp_path, "resume=last")
    assert "nothing is left to do" in resumed
    assert "the last run is a job of a sweep. To resume the sweep: " in resumed
    assert f" resume={sweep.sweep_id}\n" in resumed
    ksuit(tmp_path, *TINY, "tracker=noop")
    assert "is a job of" not in ksuit(tmp_path, "resume=last")


def test_damaged_notes_of_how_jobs_ended_are_left_out(tmp_path):
    paths = _planned(tmp_path, SWEEP_ID, "mine")
    paths.ended.write_bytes(b'\xff\n[]\n{"index": 0}\n{"index": "x", "seconds": null}\n' + b"[" * 100_000 + b"\n")
    (tmp_path / "runs.jsonl").write_text(
        '{"run_id": 3}\n{"run_id": "a", "name": "a", "start_time": NaN}\n[]\n'
        '{"run_id": "a", "name": "a", "start_time": 1e300, "tracker_id": 5}\n'
    )
    assert show_leaderboard("mine", [f"output_dir={tmp_path}"]) == 0


def _planned(folder, sweep_id, name):
    """Leave the plan of a sweep whose jobs have not begun."""
    paths, planned = SweepPaths(folder, sweep_id), _two_jobs()
    store_plan(paths, replace(planned.plan, name=name), planned.jobs)
    assert is_same(read_plan(paths).base, planned.plan.base)
    return paths


@cache
def _two_jobs():
    return plan_sweep(["tracker=noop", "seed=0,1"], "command")
