"""Sweeps: every combination is a run under one parent."""

from command import SMALL, ksuit, query, run_dirs


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
    assert len(run_dirs(tmp_path / "outputs")) == 1
    statuses = dict(query(tmp_path / "outputs", "select name, status from runs"))
    assert statuses.pop("mine") == "FAILED"
    assert list(statuses.values()) == ["FINISHED"]
