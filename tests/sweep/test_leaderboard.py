"""The leaderboard of a sweep whose runs are written by hand: their order, their status, and the tables."""

import csv
import math

import pytest

from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.errors import TrackerError
from ksuit_runner.metric_property import MetricPropertyProvider
from ksuit_runner.paths import PathProvider, SweepPaths
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.stored_run import Launch, add_to_index, store
from ksuit_runner.sweep.job_runs import JOB_TAG, SWEEP_TAG
from ksuit_runner.sweep.job_status import record_end
from ksuit_runner.sweep.leaderboard import make_leaderboard
from ksuit_runner.sweep.leaderboard_tables import print_leaderboard, write_leaderboard
from ksuit_runner.sweep.plan import Job, SweepPlan
from ksuit_runner.sweep.run_job import JobResult
from ksuit_runner.sweep.sweep_settings import RankedValue, SweepSettings
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.tracker.noop import NoopTracker
from ksuit_runner.ui.terminal import make_console

NAN, INF = float("nan"), float("inf")
ACCURACY, LOSS = "accuracy/test", "loss/test"


class Sweep:
    """Writes what the jobs of a sweep leave behind, and ranks it."""

    def __init__(self, folder):
        self.paths = SweepPaths(folder, "parent")
        self.paths.sweep_dir.mkdir(parents=True)
        self.jobs = []

    def job(self, combination, status=EndStatus.FINISHED, seconds=2.0, **histories):
        """Add a job whose run has logged these values, one per update; without a status it has not started."""
        index = len(self.jobs)
        self.jobs.append(Job(index, combination, {}))
        if not status:
            return
        run = PathProvider(self.paths.output_dir, f"run{index}")
        launch = Launch("command", [], tags={SWEEP_TAG: self.paths.sweep_id, JOB_TAG: str(index)})
        store(run, {}, launch)
        add_to_index(run, run.run_id, f"name{index}", "train")
        Outbox(run.run_id, f"name{index}", status=status if status != "RUNNING" else None).store(run)
        journal = Journal(run.journal)
        for key, values in histories.items():
            for step, value in enumerate(values):
                journal.append(step, {f"{key}/test": value})
        journal.close()
        if status != "RUNNING":
            record_end(self.paths, JobResult(index, status, run.run_id, seconds))

    def board(self, objective=ACCURACY, pruned=(), tracker=None, **settings):
        plan = SweepPlan("mine", "command", [], SweepSettings(**settings), {}, {}, objective, created=0.0)
        properties = MetricPropertyProvider()
        return make_leaderboard(self.paths, plan, self.jobs, tracker or NoopTracker(), properties, frozenset(pruned))


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


def order(board):
    return [row.index for row in board.rows]


def shown(board, capsys):
    print_leaderboard(make_console(), board)
    return capsys.readouterr().out


@pytest.mark.parametrize(("objective", "best_first"), [(ACCURACY, [1, 2, 0]), (LOSS, [0, 2, 1])])
def test_the_better_direction_of_the_objective_ranks(sweep, objective, best_first):
    for value in (0.1, 0.9, 0.5):
        sweep.job({"lr": str(value)}, accuracy=[value], loss=[value])
    board = sweep.board(objective)
    assert order(board) == best_first
    assert board.metric_keys == [objective]


class Away(NoopTracker):
    """A tracker that cannot be reached."""

    def children(self, run_id):
        raise TrackerError("it does not answer")


def test_the_tracker_is_asked_only_for_runs_that_the_output_folder_lacks(sweep):
    sweep.job({"lr": "1"}, accuracy=[0.5])
    assert sweep.board(tracker=Away()).rows[0].run_id == "run0"
    sweep.job({"lr": "2"}, status=None)
    with pytest.raises(TrackerError, match="does not answer"):
        sweep.board(tracker=Away())


def test_equal_jobs_stay_in_their_order(sweep):
    for lr in "123":
        sweep.job({"lr": lr}, accuracy=[0.5])
    assert order(sweep.board()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "best_first", "counts"), [("last", [1, 0], [0.7, 0.6]), ("best", [0, 1], [0.8, 0.7])]
)
def test_a_job_counts_by_its_last_or_its_best_value(sweep, value, best_first, counts):
    sweep.job({"lr": "1"}, accuracy=[0.5, 0.8, NAN, 0.6])
    sweep.job({"lr": "2"}, accuracy=[0.1, 0.7])
    board = sweep.board(value=RankedValue(value))
    assert order(board) == best_first
    assert [row.metrics[ACCURACY] for row in board.rows] == counts


def test_a_job_that_only_ever_had_nan_has_no_best_value(sweep):
    sweep.job({"lr": "1"}, accuracy=[NAN, NAN])
    sweep.job({"lr": "2"}, accuracy=[0.0])
    board = sweep.board(value=RankedValue.BEST)
    assert order(board) == [1, 0]
    assert math.isnan(board.rows[1].metrics[ACCURACY])


def test_only_what_differs_is_shown(sweep, capsys):
    sweep.job({"optimizer.lr": "1", "model": "mlp", "+model.width": "8", "seed": "0"}, accuracy=[0.5])
    sweep.job({"optimizer.lr": "1", "model": "mlp", "+model.width": "16", "seed": "0"}, accuracy=[0.6])
    board = sweep.board()
    assert board.keys == ["+model.width"] and board.groups == []
    lines = [line.split() for line in shown(board, capsys).splitlines()]
    assert lines[0] == ["job", "model.width", ACCURACY, "status", "time", "run"]
    assert lines[1] == ["2", "16", "0.6", "finished", "2s", "run1"]


def test_what_has_not_finished_keeps_its_status_and_ranks_below_all_that_has(sweep):
    sweep.job({"lr": "0"}, EndStatus.FAILED, accuracy=[0.99])
    sweep.job({"lr": "1"}, EndStatus.KILLED, accuracy=[0.98])
    sweep.job({"lr": "2"}, "")
    sweep.job({"lr": "3"}, "RUNNING", accuracy=[0.97])
    sweep.job({"lr": "4"}, accuracy=[0.1])
    sweep.job({"lr": "5"}, accuracy=[NAN])
    sweep.job({"lr": "6"}, accuracy=[0.2])
    sweep.job({"lr": "7"})
    board = sweep.board()
    assert order(board) == [6, 4, 5, 7, 0, 1, 3, 2]
    finished = ["finished"] * 4
    assert [row.status for row in board.rows] == [*finished, "failed", "killed", "running", "missing"]
    assert board.rows[-1].run_id is None


def test_a_job_that_failed_before_it_had_a_run_has_failed(sweep):
    sweep.job({"lr": "1"}, "")
    record_end(sweep.paths, JobResult(0, EndStatus.FAILED, None, 1.0, error="no such model"))
    (row,) = sweep.board().rows
    assert (row.status, row.run_id, row.seconds) == ("failed", None, 1.0)


def test_the_time_of_a_job_is_that_of_all_its_attempts(sweep):
    sweep.job({"lr": "1"}, seconds=2.0)
    record_end(sweep.paths, JobResult(0, EndStatus.FINISHED, "run0", 3.5))
    with sweep.paths.ended.open("a") as file:
        file.write('{"index": 0, "sec')  # torn by a crash
    assert sweep.board().rows[0].seconds == 5.5


def test_a_job_that_was_pruned_says_so_and_counts_in_no_mean(sweep):
    for index, value in enumerate((0.5, 0.9, 0.6)):
        sweep.job({"lr": "1", "seed": str(index)}, accuracy=[value])
    board = sweep.board(pruned=[1])
    assert order(board) == [2, 0, 1]
    assert board.rows[-1].status == "pruned"
    (group,) = board.groups
    assert (group.count, group.mean) == (2, pytest.approx(0.55))


def test_runs_of_other_sweeps_do_not_count(sweep, tmp_path):
    sweep.job({"lr": "1"}, accuracy=[0.5])
    stranger = PathProvider(tmp_path, "stranger")
    store(stranger, {}, Launch("command", [], tags={SWEEP_TAG: "other", JOB_TAG: "0"}))
    add_to_index(stranger, "stranger", "name0", "train")
    assert [row.run_id for row in sweep.board().rows] == ["run0"]


@pytest.mark.parametrize(("objective", "best_first"), [(ACCURACY, ["2", "1", "3"]), (LOSS, ["3", "1", "2"])])
def test_mean_and_sample_deviation_over_seeds(sweep, objective, best_first):
    results = {"1": (0.4, 0.6), "2": (0.7, 0.8, 0.9), "3": (0.1,)}
    for lr, values in results.items():
        for seed, value in enumerate(values):
            sweep.job({"lr": lr, "seed": str(seed)}, accuracy=[value], loss=[value])
    groups = {group.values["lr"]: group for group in sweep.board(objective).groups}
    assert list(groups) == best_first
    assert [groups[lr].mean for lr in results] == pytest.approx([0.5, 0.8, 0.1])
    assert [groups[lr].deviation for lr in "12"] == pytest.approx([0.2 / 2**0.5, 0.1])
    assert groups["3"].deviation is None
    assert [groups[lr].count for lr in results] == [2, 3, 1]


def test_means_are_over_what_is_asked_for(sweep, capsys):
    for lr, values in {"1": (0.4, 0.6), "2": (0.7, 0.9)}.items():
        for fold, value in enumerate(values):
            sweep.job({"lr": lr, "+data.fold": str(fold)}, accuracy=[value])
    assert sweep.board().groups == []
    board = sweep.board(mean_over=["data.fold"])
    assert [(group.values, group.mean, group.count) for group in board.groups] == [
        ({"lr": "2"}, pytest.approx(0.8), 2),
        ({"lr": "1"}, pytest.approx(0.5), 2),
    ]
    assert shown(board, capsys).splitlines()[-3].split()[-1] == "folds"


@pytest.mark.parametrize("diverged", [NAN, INF])
def test_a_seed_that_diverged_is_no_mean_and_comes_last(sweep, diverged, capsys):
    for lr, values in {"1": (0.1, diverged), "2": (0.5, 0.7), "3": (0.9, 0.8)}.items():
        for seed, value in enumerate(values):
            sweep.job({"lr": lr, "seed": str(seed)}, loss=[value])
    board = sweep.board(LOSS)
    assert [group.values["lr"] for group in board.groups] == ["2", "3", "1"]
    assert math.isnan(board.groups[-1].mean) and board.groups[-1].count == 2
    assert order(board) == [0, 2, 3, 5, 4, 1]
    assert shown(board, capsys).splitlines()[-1].split() == ["1", "nan", "±", "nan", "2"]


def test_failed_seeds_are_left_out_of_the_mean(sweep):
    sweep.job({"lr": "1", "seed": "0"}, accuracy=[0.5])
    sweep.job({"lr": "1", "seed": "1"}, EndStatus.FAILED, accuracy=[0.1])
    sweep.job({"lr": "2", "seed": "0"}, EndStatus.FAILED, accuracy=[0.1])
    (group,) = sweep.board().groups
    assert (group.values, group.mean, group.deviation, group.count) == ({"lr": "1"}, 0.5, None, 1)


def test_a_published_figure_stands_beside_the_mean(sweep, capsys):
    for model in ("mlp", "cnn"):
        for seed in "01":
            sweep.job({"model": model, "seed": seed}, accuracy=[0.5])
    lines = shown(sweep.board(published={"mlp": 0.68}), capsys).splitlines()
    assert lines[-3].split()[-2:] == ["seeds", "published"]
    assert lines[-2].split() == ["mlp", "0.5", "±", "0", "2", "0.68"]
    assert lines[-1].split() == ["cnn", "0.5", "±", "0", "2"]


def test_without_an_objective_jobs_stay_in_their_order_with_all_metrics_that_can_be_better(sweep, capsys):
    sweep.job({"seed": "0"}, accuracy=[0.9, 0.1], loss=[2.0], gradient_norm=[3.0])
    sweep.job({"seed": "1"}, accuracy=[0.5])
    board = sweep.board(None)
    assert order(board) == [0, 1]
    assert board.rows[0].metrics == {ACCURACY: 0.1, LOSS: 2.0}
    assert board.groups == []
    lines = shown(board, capsys).splitlines()
    assert lines[0].split() == ["job", "seed", ACCURACY, LOSS, "status", "time", "run"]
    assert [line.split()[2] for line in lines[1:3]] == ["0.1", "0.5"]
    assert lines[3:] == [
        f"not ranked, as the sweep has no objective; to rank it: leaderboard=SWEEP_ID objective={ACCURACY}"
    ]
    assert "objective" not in shown(sweep.board(), capsys)


def test_the_files_have_what_the_terminal_shows(sweep):
    sweep.job({"lr": "0.000123456789", "seed": "0"}, accuracy=[2 / 3])
    sweep.job({"lr": "'a|b'", "seed": "1"}, EndStatus.FAILED)
    sweep.job({"lr": "'a|b'", "seed": "0"}, "")
    write_leaderboard(sweep.paths, sweep.board())
    assert sweep.paths.table.read_text().splitlines() == [
        "# mine",
        "",
        "| job | lr | seed | accuracy/test | status | time | run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 1 | 0.000123457 | 0 | 0.6667 | finished | 2s | run0 |",
        r"| 2 | 'a\|b' | 1 |  | failed | 2s | run1 |",
        r"| 3 | 'a\|b' | 0 |  | missing |  |  |",
        "",
        "| lr | accuracy/test (mean ± deviation) | seeds |",
        "| --- | --- | --- |",
        "| 0.000123457 | 0.6667 | 1 |",
    ]
    with sweep.paths.csv.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["job", "lr", "seed", "accuracy/test", "status", "seconds", "run"],
            ["1", "0.000123456789", "0", repr(2 / 3), "finished", "2.0", "run0"],
            ["2", "'a|b'", "1", "", "failed", "2.0", "run1"],
            ["3", "'a|b'", "0", "", "missing", "0.0", ""],
        ]
