"""Sweeps as a person runs them: one parent, its jobs, the table at the end, and what happens when a job fails."""

import json
import re
import signal
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
from command import REPOSITORY, SMALL, checkpoint_bytes, journal, query, run_dirs, stop_at
from command import ksuit as command_line
from preloaded import ksuit, start

from ksuit_runner.cli.annotate import annotate
from ksuit_runner.cli.export import export
from ksuit_runner.errors import ConfigError, ResumeError
from ksuit_runner.paths import SweepPaths
from ksuit_runner.recorder import tracker
from ksuit_runner.recorder.client import RecorderClient
from ksuit_runner.reports.report import report
from ksuit_runner.reports.show import show
from ksuit_runner.sweep import commands
from ksuit_runner.sweep.commands import resume_sweep, show_leaderboard, start_sweep
from ksuit_runner.sweep.job_config import JobComposer
from ksuit_runner.sweep.plan import read_plan

FAST = (
    *SMALL,
    "trainer.max_epochs=1",
    "default_callbacks=none",
    "callbacks=[accuracy]",
    "+callbacks.accuracy.at_start=true",
)


def runs(output_dir):
    """Return the jobs' runs by what varies, and the id of their only parent."""
    rows = query(output_dir, "select run_uuid, key, value from tags")
    tags = {}
    for run_id, key, value in rows:
        tags.setdefault(run_id, {})[key] = value
    children = {run_id: found for run_id, found in tags.items() if "mlflow.parentRunId" in found}
    (parent,) = {found["mlflow.parentRunId"] for found in children.values()}
    assert tags[parent]["ksuit.kind"] == "sweep"
    return parent, {found["ksuit.overrides"]: (run_id, found) for run_id, found in children.items()}


def statuses(output_dir):
    return dict(query(output_dir, "select run_uuid, status from runs"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("swept")
    output = ksuit(
        output_dir, "-m", *FAST, "optimizer.lr=1e-3,1e-2", "seed=0,1", "objective=accuracy/validation", "name=mine"
    )
    return output_dir, output


def test_runs_are_nested_under_one_parent_and_tagged_with_their_overrides(swept):
    output_dir, _ = swept
    parent, found = runs(output_dir)
    assert list(found) == [f"optimizer.lr={lr} seed={seed}" for lr in ("0.001", "0.01") for seed in (0, 1)]
    for index, (run_id, tags) in enumerate(found.values()):
        assert (tags["ksuit.sweep"], tags["ksuit.job"]) == (parent, str(index))
        assert tags["ksuit.overrides"] == f"optimizer.lr={tags['sweep.optimizer.lr']} seed={tags['sweep.seed']}"
        launch = json.loads((output_dir / "runs" / run_id / "artifacts" / "launch.json").read_text())
        assert launch["overrides"][-2:] == tags["ksuit.overrides"].split()
    assert set(statuses(output_dir).values()) == {"FINISHED"}
    assert len(statuses(output_dir)) == 5


def test_the_table_ranks_the_jobs_and_shows_mean_and_deviation_over_seeds(swept):
    _, output = swept
    lines = [line.split() for line in output.splitlines()]
    start_ = next(index for index, line in enumerate(lines) if line[:3] == ["job", "optimizer.lr", "seed"])
    rows = lines[start_ + 1 : start_ + 5]
    assert [row[1] for row in rows] == ["0.01", "0.01", "0.001", "0.001"]
    values = [float(row[3]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert all(row[4] == "finished" for row in rows)
    assert "max_epochs" not in output[output.index("job  ") :]
    groups = lines[-2:]
    assert [group[0] for group in groups] == ["0.01", "0.001"]
    assert float(groups[0][1]) == pytest.approx(sum(values[:2]) / 2, abs=1e-3)
    assert float(groups[0][3]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5, rel=0.05)


def test_the_leaderboard_is_stored_with_the_parent_and_can_be_asked_for_again(swept, capsys, monkeypatch):
    output_dir, output = swept
    parent, _ = runs(output_dir)
    artifacts = output_dir / "runs" / parent / "artifacts"
    assert {path.name for path in artifacts.iterdir()} == {
        *("plan.json", "jobs.jsonl", "signature", "leaderboard.md", "leaderboard.csv", "leaderboard.png")
    }
    assert (artifacts / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
    assert "| 0.01 | " in (artifacts / "leaderboard.md").read_text()
    told = dict(query(output_dir, f"select key, value from tags where run_uuid = '{parent}'"))
    assert "| 0.01 | " in told["mlflow.note.content"], "MLflow's page shows it as the description"
    assert told["ksuit.best"].startswith("accuracy/")
    table = output[output.index("job  ") :]
    assert ksuit(output_dir, f"leaderboard={parent[:8]}") == table
    assert ksuit(output_dir, "leaderboard=mine") == table
    assert ksuit(output_dir, "leaderboard=last") == table
    assert "There is no sweep" in ksuit(output_dir, "leaderboard=mime", status=2).replace("there", "There")
    assert "Did you mean 'last'?" in ksuit(output_dir, "leaderboard=lst", status=2)
    here = [f"output_dir={output_dir}"]
    capsys.readouterr()
    monkeypatch.setattr(commands, "read_plan", lambda paths: replace(read_plan(paths), objective=None))
    assert show_leaderboard("mine", here) == 0
    unranked = capsys.readouterr().out
    assert unranked != table and "to rank it: leaderboard=SWEEP_ID objective=accuracy/validation" in unranked
    assert show_leaderboard("mine", [*here, "objective=accuracy/validation"]) == 0
    assert capsys.readouterr().out == table
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="^objective: acuracy/validation: no job has.*. Did you mean 'accuracy/"):
        show_leaderboard("mine", [*here, "objective=acuracy/validation"])
    with pytest.raises(ConfigError, match="^seed=1: with leaderboard= only output_dir, tracker, trust, objective can"):
        show_leaderboard("mine", [*here, "seed=1"])
    annotate("mine", [*here, "notes=my first", "tags=[paper]"])
    told = dict(query(output_dir, f"select key, value from tags where run_uuid = '{parent}'"))
    assert told["mlflow.note.content"].startswith("my first\n\n| job |") and told["ksuit.tags"] == "paper"
    capsys.readouterr()
    show("mine", here)
    shown = capsys.readouterr().out
    assert "my first" in shown and shown.endswith(table)
    with pytest.raises(
        ResumeError, match=f"this is a sweep, and export= takes one of its runs: leaderboard={parent[:8]}"
    ):
        export(parent, here)


def test_the_page_of_a_sweep_has_the_leaderboard_what_varies_and_the_curves_of_the_best(swept, tmp_path):
    output_dir, output = swept
    target, (parent, _) = tmp_path / "sweep.html", runs(output_dir)
    assert report("mine", [f"output_dir={output_dir}", f"export_to={target}"]) == 0
    page = target.read_text()
    cells = re.findall("<td>([^<]*)</td>", page)
    assert {"4 finished", "accuracy/validation, higher is better", "0.001", "0.01", parent} <= set(cells)
    best = output[output.index("job  ") :].splitlines()[1].split()
    assert cells[cells.index("0.01") - 1 :][:4] == best[:4], "the leaderboard begins with the best job"
    assert next(line.split()[1] for line in reversed(output.splitlines()) if "±" in line) in page
    pictures = re.findall('<h2>([^<]*)</h2>\n<img alt="[^"]*" src="data:image/svg[^"]*">', page)
    assert pictures == ["Objective over what varies", "All together", "Curves of the best jobs"]
    assert "<h2>Mean over seed</h2>" in page and not re.findall(r'(?:src|href)="(?!data:)', page)


def test_no_state_leaks_from_one_job_to_the_next(swept, tmp_path):
    output_dir, _ = swept
    _, found = runs(output_dir)
    alone = ("optimizer.lr=1e-2", "seed=1", "objective=accuracy/validation", "name=mine")
    ksuit(tmp_path, *FAST, *alone)
    (directory,) = run_dirs(tmp_path)
    in_sweep = output_dir / "runs" / found["optimizer.lr=0.01 seed=1"][0]
    assert checkpoint_bytes(in_sweep) == checkpoint_bytes(directory)
    assert journal(in_sweep) == journal(directory)
    configs = [(path / "artifacts" / "config.yaml").read_text().splitlines() for path in (in_sweep, directory)]
    differing = [line for line in zip(*configs, strict=True) if line[0] != line[1]]
    assert [line[0].split(":")[0] for line in differing] == ["output_dir", "parent_run_id"]


def test_a_run_of_a_sweep_can_be_resumed_by_itself(swept):
    output_dir, _ = swept
    _, found = runs(output_dir)
    run_id = found["optimizer.lr=0.001 seed=0"][0]
    output = ksuit(output_dir, f"resume={run_id}", "trainer.max_epochs=2")
    assert "starts from checkpoint E1_" in output


QUICK = ("trainer.max_epochs=1", "default_callbacks=none", "callbacks=[accuracy]", "+callbacks.accuracy.at_start=true")


def test_a_failed_job_is_reported_at_once_and_the_others_continue(project, tmp_path):
    output = ksuit(tmp_path / "outputs", "sweep=fails", *QUICK, status=1, cwd=project)
    assert "updates/s" not in output and "folder  " not in output  # its jobs are quiet
    assert output.index("RuntimeError: this one breaks") < output.index("job 2/3  starts")
    report = output[output.index("error: job 1 failed: RuntimeError: this one breaks") :]
    assert "run.log" in report.splitlines()[1]
    assert "Traceback" in report and output.count("Traceback") == 1
    assert "error: job 2 failed: model: fails_at: it cannot even be built" in output
    *rows, resume = output.splitlines()[-4:]
    words = [row.split()[-4:] for row in rows]
    assert [("finished" in row, "failed" in row) for row in words] == [(True, False), (False, True), (False, True)]
    assert resume.startswith("resume  ") and "resume=" in resume
    assert sorted(statuses(tmp_path / "outputs").values()) == ["FAILED", "FAILED", "FINISHED"]

    again = ksuit(tmp_path / "outputs", "resume=fails", "sweep.retry=false", status=1, cwd=project)
    assert "starts" not in again
    retried = ksuit(tmp_path / "outputs", "resume=fails", status=1, cwd=project)
    assert retried.count("3  starts") == 2
    assert len(statuses(tmp_path / "outputs")) == 3


def test_fail_fast_ends_the_sweep_with_the_first_failure(project, tmp_path):
    output = ksuit(tmp_path / "outputs", "sweep=fails", "sweep.fail_fast=true", *QUICK, status=1, cwd=project)
    assert output.count("starts") == 1
    assert [line.split()[-1] for line in output.splitlines()[-3:-1]] == ["missing", "missing"]


def test_one_bad_value_is_reported_before_anything_trains(tmp_path):
    output = ksuit(tmp_path, "-m", *FAST, "optimizer.lr=1e-2,fast", status=2)
    assert output.startswith("error: optimizer.lr: expects a number")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m", *FAST, "optimizer.lr=1e-2,fast"), "error: optimizer.lr: expects a number"),
        (("model=fragile", "model.fails_at=0"), "error: model: fails_at: it cannot even be built"),
    ],
)
def test_what_is_refused_once_the_recorder_has_begun_leaves_nothing(arguments, message, project, tmp_path, monkeypatch):
    temporary, outputs = tmp_path / "temporary", tmp_path / "outputs"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    before = sorted(project.rglob("*"))
    assert command_line(outputs, *arguments, status=2, cwd=project).startswith(message)
    deadline = time.monotonic() + 20
    while any(belongs_to(process, temporary) for process in psutil.process_iter()):
        assert time.monotonic() < deadline, "a process stays"
        time.sleep(0.05)
    assert not outputs.exists()
    assert list(temporary.iterdir()) == []
    assert sorted(project.rglob("*")) == before


def belongs_to(process, temporary):
    """Whether a process lives that was started with this folder for temporary files, as also a recorder is."""
    with suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get("TMPDIR") == str(temporary)
    return False


def test_the_recorder_begins_once_a_job_is_checked_and_starts_while_torch_is_imported(tmp_path, monkeypatch):
    events = []
    spy(monkeypatch, JobComposer, "job", lambda self, combination, number=0: events.append(f"job {number}"))
    spy(monkeypatch, RecorderClient, "open", lambda self, opening: events.append("recorder"))
    spy(monkeypatch, RecorderClient, "warm_up", lambda self, session: events.append("warm"))
    spy(monkeypatch, RecorderClient, "call", lambda self, session, method, *given: events.append(method))
    spy(monkeypatch, commands, "import_engine", lambda: events.append("torch"))
    outcome = start_sweep([*FAST, "tracker=noop", "seed=0,1", f"output_dir={tmp_path}"], "command")
    assert events[: events.index("start_run") + 1] == ["job 0", "recorder", "warm", "job 1", "torch", "start_run"]
    assert events.count("recorder") == 3, "one for the sweep and one for each job"
    assert outcome.exit_status == 0


def test_a_sweep_whose_jobs_run_elsewhere_imports_no_torch_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "import_engine", lambda: pytest.fail("it is needed in their processes only"))
    monkeypatch.setattr(commands, "SweepRunner", lambda *given: SimpleNamespace(run=lambda *given: "run"))
    for launched in ("launcher=joblib", "ranks=2"):
        given = [*FAST, launched, "trainer=ddp", "tracker=noop", "seed=0,1", f"output_dir={tmp_path}"]
        assert start_sweep(given, "command") == "run"


def test_a_resume_imports_torch_while_the_recorder_starts_if_a_job_is_left(tmp_path, monkeypatch):
    outcome = start_sweep([*FAST, "tracker=noop", "seed=0,1", f"output_dir={tmp_path}"], "command")
    paths = SweepPaths(tmp_path, outcome.run_id)
    events = []
    spy(monkeypatch, RecorderClient, "warm_up", lambda self, session: events.append("warm"))
    spy(monkeypatch, RecorderClient, "describe", lambda self, session: events.append("wait"))
    spy(monkeypatch, commands, "import_engine", lambda: events.append("torch"))

    def resume(*overrides):
        events.clear()
        tracker._known.clear()  # as in a process of its own
        assert resume_sweep(paths, [f"output_dir={tmp_path}", *overrides]).exit_status == 0
        return events[:3]

    assert resume() == ["warm", "wait"], "nothing is left"
    ends = paths.ended.read_text()
    paths.ended.write_text(ends.splitlines(keepends=True)[0])
    assert resume() == ["warm", "torch", "wait"]
    paths.ended.write_text(ends.replace("FINISHED", "FAILED"))
    assert resume() == ["warm", "torch", "wait"]
    paths.ended.write_text(ends.replace("FINISHED", "FAILED"))
    assert resume("sweep.retry=false") == ["warm", "wait"]
    paths.ended.unlink()
    assert resume("launcher=joblib") == ["warm", "wait"], "what is left runs elsewhere"


def spy(monkeypatch, owner, name, note):
    """Have a function noted before it is called."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given, **named: (note(*given, **named), original(*given, **named))[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_running_job_cleanly_and_the_sweep_with_it(number, tmp_path):
    arguments = (
        "-m",
        *SMALL,
        "trainer.max_epochs=4000",
        "checkpoint=at_end",
        "seed=0,1",
        "objective=accuracy/validation",
    )
    process = start(tmp_path, *arguments)
    output = stop_at(process, tmp_path, 30, number)
    assert process.returncode == 128 + number, output
    assert set(statuses(tmp_path).values()) == {"KILLED"}
    (directory,) = (path for path in run_dirs(tmp_path) if (path / "metrics.jsonl").exists())
    assert (directory / "artifacts" / "checkpoints" / "latest").exists()
    assert [line.split()[-3 if "killed" in line else -1] for line in output.splitlines()[-3:-1]].count("missing") == 1


def test_what_ships_is_a_command_away():
    for path in (REPOSITORY / "conf" / "sweep").glob("*.yaml"):
        assert f"# ksuit-runner sweep={path.stem}" in path.read_text().splitlines()[:2]
