"""Sweeps: every combination is a run under one parent."""

import re

from command import SMALL, ksuit, query, run_dirs
from servers import locked

from ksuit_runner.paths import OutputPaths
from ksuit_runner.tracker import embedded


def parents(output_dir):
    return query(output_dir, "select value from tags where key = 'mlflow.parentRunId'")


def test_sweep_on_the_command_line_nests_runs_and_ends_with_a_table(tmp_path):
    output = ksuit(
        tmp_path, "-m", *SMALL, "trainer.max_epochs=1", "optimizer.lr=1e-2,1e-3", "seed=0,1", "objective=accuracy/test"
    )
    found = parents(tmp_path)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert query(tmp_path, "select distinct status from runs") == [("FINISHED",)]
    assert len(set(query(tmp_path, "select name from runs"))) == 5
    assert output.count("parameter_count: ") == 4  # each run is logged, not the first one only
    table = output.splitlines()[-5:]
    assert "accuracy/test" in table[0]
    for line, words in zip(
        table[1:], ("lr=0.01 seed=0", "lr=0.01 seed=1", "lr=0.001 seed=0", "lr=0.001 seed=1"), strict=True
    ):
        assert words in line and "finished" in line and "max_epochs" not in line


def test_sweep_in_a_yaml_needs_no_flag_and_a_failed_run_does_not_end_it(tmp_path):
    project = tmp_path / "project"
    (project / "conf" / "sweep").mkdir(parents=True)
    (project / "conf" / "sweep" / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      data.batch_size: 100000,64\n"
    )
    output = ksuit(tmp_path / "outputs", "sweep=mine", *SMALL, status=2, cwd=project)
    assert "data.batch_size: 100000 is more than the 1438 training samples" in output
    assert "failed" in output.splitlines()[-2] and "finished" in output.splitlines()[-1]
    assert len([path for path in run_dirs(tmp_path / "outputs") if (path / "metrics.jsonl").exists()]) == 1
    statuses = dict(query(tmp_path / "outputs", "select name, status from runs"))
    assert statuses.pop("mine") == "FAILED"
    assert list(statuses.values()) == ["FINISHED"]


def test_a_sweep_without_its_tracker_does_not_start_or_is_registered_later(tmp_path):
    arguments = ("-m", "seed=0,1", "model=linear", "trainer.max_epochs=1", "tracker.timeout_s=0.2")
    embedded.open_store(OutputPaths(tmp_path))
    with locked(tmp_path / "mlflow.db"):
        assert re.fullmatch("error: .*database is locked\n", ksuit(tmp_path, *arguments, status=2))
        assert not (tmp_path / "runs").exists()
        output = ksuit(tmp_path, *arguments, "tracker.require=false", "name=late")
    commands = re.findall("sync=([0-9a-f]{32})", output)
    assert len(commands) == 3
    for run_id in commands:
        ksuit(tmp_path, f"sync={run_id}")
    statuses = query(tmp_path, "select name, status from runs")
    assert statuses == [("late", "FINISHED")] * 3
    assert len(parents(tmp_path)) == 2
    assert len(set(parents(tmp_path))) == 1
