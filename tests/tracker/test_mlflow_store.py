import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier

import pytest

from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.point import Point
from ksuit_runner.tracker import mlflow_store as embedded
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.tracker.mlflow import MlflowTracker

_LOG = """
import sys
from pathlib import Path
from ksuit_runner.record.point import Point
from ksuit_runner.paths import OutputPaths
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.tracker.mlflow import MlflowTracker
tracker = MlflowTracker(OutputPaths(sys.argv[1]))
tracker.start_run(sys.argv[2], {})
for step in range(10):
    tracker.log_points([Point(f"k{i}", i, step, 1) for i in range(100)])
tracker.end_run(EndStatus.FINISHED)
"""


def _start(output_dir: Path, name: str) -> "subprocess.Popen[bytes]":
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.Popen(
        [sys.executable, "-c", _LOG, str(output_dir), name], env=environment, stderr=subprocess.PIPE
    )


def test_processes_that_create_the_store_at_once_share_it(tmp_path: Path) -> None:
    processes = [_start(tmp_path / "outputs", name) for name in "abc"]
    errors = [process.communicate()[1] for process in processes]
    assert errors == [b""] * 3  # neither errors nor MLflow's chatter
    paths = OutputPaths(tmp_path / "outputs")
    assert sorted(path.name for path in paths.output_dir.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
    tracker = MlflowTracker(paths)
    for name in "abc":
        (run,) = tracker.find(name)
        assert run.status == "FINISHED"
        assert tracker.last_steps(run.run_id) == {f"k{i}": 9 for i in range(100)}


def test_looking_creates_nothing(tmp_path: Path) -> None:
    paths = OutputPaths(tmp_path / "outputs")
    assert not embedded.exists(paths)
    assert MlflowTracker(paths).find("last") == []
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_creation_left_is_no_store(tmp_path: Path) -> None:
    paths = OutputPaths(tmp_path)
    (tmp_path / "mlflow.db.tmp").write_bytes(b"half a database")
    assert not embedded.exists(paths)
    tracker = MlflowTracker(paths)
    tracker.start_run("after", {})
    assert [run.name for run in tracker.find("last")] == ["after"]


def _content(paths: OutputPaths) -> tuple[list[tuple], dict[str, list[str]], dict[str, list[tuple]]]:
    """Return what SQLite is told of a database, its schema, and its rows without times.

    The constraints and indices of a table are sorted: their order is that of sets in MLflow.
    """
    with closing(sqlite3.connect(paths.database)) as database:
        told = [
            database.execute(f"PRAGMA {name}").fetchall()
            for name in ("journal_mode", "page_size", "encoding", "auto_vacuum", "user_version", "application_id")
        ]
        tables = database.execute("SELECT name, sql FROM sqlite_master").fetchall()
        schema = {name: sorted(line.strip(" ,\t") for line in (sql or "").splitlines()) for name, sql in tables}
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        rows = {}
        for (name,) in names:
            columns = database.execute("SELECT name FROM pragma_table_info(?)", (name,)).fetchall()
            kept = ", ".join(column for (column,) in columns if not column.endswith("_time"))
            rows[name] = sorted(database.execute(f"SELECT {kept} FROM {name}").fetchall())
    return told, schema, rows


def test_a_store_that_was_made_ahead_is_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "there is no temporary folder"))
    paths = OutputPaths(tmp_path / "it's here")
    blank = embedded.make_blank(paths)
    assert list(tmp_path.iterdir()) == []
    embedded.open_store(paths, blank=blank)
    assert paths.database.read_bytes() == blank
    ahead = _content(paths)
    assert ahead[2]["experiments"][0][2] == f"{paths.runs_dir.as_uri()}/0"
    shutil.rmtree(paths.output_dir)
    embedded.open_store(paths)
    assert _content(paths) == ahead


def test_a_tracker_that_is_warm_uses_what_it_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, there = OutputPaths(tmp_path / "new"), OutputPaths(tmp_path / "there")
    embedded.open_store(there)
    trackers = [MlflowTracker(new), MlflowTracker(there)]
    for tracker in trackers:
        tracker.warm_up()
    assert not new.output_dir.exists()
    monkeypatch.delattr(embedded, "_new_store")  # nothing is made from now on
    for tracker in trackers:
        run_id = tracker.start_run("warm", {}).run_id
        assert [run.run_id for run in tracker.find("last")] == [run_id]
    with pytest.raises(NameError):
        embedded.open_store(OutputPaths(tmp_path / "cold"))


def test_stores_are_made_ahead_in_several_threads(tmp_path: Path) -> None:
    folders = [OutputPaths(tmp_path / name) for name in "abcd"]
    together = Barrier(len(folders))

    def make(paths: OutputPaths) -> None:
        together.wait()
        embedded.open_store(paths, blank=embedded.make_blank(paths))

    with ThreadPoolExecutor(len(folders)) as threads:
        list(threads.map(make, folders))
    contents = [_content(paths) for paths in folders]
    assert all(content[1] == contents[0][1] for content in contents)
    places = [content[2]["experiments"][0][2] for content in contents]
    assert places == [f"{paths.runs_dir.as_uri()}/0" for paths in folders]


@pytest.mark.parametrize("copied", [False, True])
def test_a_moved_folder_keeps_its_runs_and_their_files(tmp_path: Path, copied: bool) -> None:
    old, new = OutputPaths(tmp_path / "old"), OutputPaths(tmp_path / "some where" / "else")
    tracker = MlflowTracker(old, experiment="mine")
    run_id = tracker.start_run("moved", {}).run_id
    config = PathProvider(old.output_dir, run_id).config
    config.parent.mkdir(parents=True)
    config.write_text("seed: 1")
    tracker.end_run(EndStatus.FINISHED)
    shutil.copytree(old.output_dir, new.output_dir)
    if not copied:
        shutil.rmtree(old.output_dir)

    moved = MlflowTracker(new, experiment="mine")
    assert moved.list_artifacts(run_id=run_id) == ["config.yaml"]
    moved.resume_run(run_id)
    assert moved.artifacts_are_local
    assert moved.start_run("next", {}).run_id != run_id
    assert moved.artifacts_are_local
    assert old.output_dir.exists() == copied
    if copied:
        assert [run.name for run in MlflowTracker(old).find("last")] == ["moved"]


def test_other_experiments_keep_their_place(tmp_path: Path) -> None:
    paths = OutputPaths(tmp_path / "outputs")
    MlflowTracker(paths).start_run(None, {})
    with closing(sqlite3.connect(paths.database)) as database, database:
        database.execute(
            "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) "
            "VALUES (77, 'theirs', '/theirs/runs', 'active')"
        )
    moved = OutputPaths(tmp_path / "moved")
    shutil.move(paths.output_dir, moved.output_dir)
    embedded.open_store(moved)
    with closing(sqlite3.connect(moved.database)) as database:
        places = dict(database.execute("SELECT name, artifact_location FROM experiments"))
    assert places["theirs"] == "/theirs/runs"
    assert places["ksuit_runner"] == str(moved.runs_dir)


def test_a_database_is_opened_once_for_as_long_as_it_is_the_same_file(tmp_path: Path, monkeypatch) -> None:
    opened, paths = [], OutputPaths(tmp_path / "outputs")

    def move_experiments(database, *args, move=embedded.move_experiments):
        opened.append(database)
        return move(database, *args)

    monkeypatch.setattr(embedded, "move_experiments", move_experiments)
    for _ in range(3):
        assert embedded.open_store(paths) == embedded.uri(paths)
    assert opened == [paths.database]
    moved = OutputPaths(tmp_path / "moved")
    shutil.copytree(paths.output_dir, moved.output_dir)
    embedded.open_store(moved)
    copy = tmp_path / "copy.db"
    shutil.copy(paths.database, copy)
    copy.replace(paths.database)
    embedded.open_store(paths)
    embedded.open_store(paths)
    paths.database.unlink()
    assert embedded.open_store(paths) and paths.database.exists()
    assert opened == [paths.database, moved.database, paths.database, paths.database]
    elsewhere = OutputPaths(tmp_path / "elsewhere")
    paths.output_dir.rename(elsewhere.output_dir)
    embedded.open_store(elsewhere)
    elsewhere.output_dir.rename(paths.output_dir)
    embedded.open_store(paths)
    assert opened[4:] == [elsewhere.database, paths.database], "the experiments are moved back as well"
    paths.database.rename(copy)
    paths.database.symlink_to(copy)
    with pytest.raises(TrackerError, match="is a link"):
        embedded.open_store(paths)


def test_a_path_that_a_uri_cannot_hold_is_refused(tmp_path: Path) -> None:
    tracker = MlflowTracker(OutputPaths(tmp_path / "50%?"))
    with pytest.raises(TrackerError, match=r"path with '%\?'"):
        tracker.start_run(None, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "outputs").touch()
    with pytest.raises(TrackerError, match="File exists") as caught:
        MlflowTracker(OutputPaths(tmp_path / "outputs")).start_run(None, {})
    assert "\n" not in str(caught.value)


def test_a_damaged_database_is_refused_in_one_line(tmp_path: Path) -> None:
    paths = OutputPaths(tmp_path)
    paths.database.write_bytes(b"no database" * 100)
    with pytest.raises(TrackerError, match="not a database") as caught:
        MlflowTracker(paths).find("last")
    assert "\n" not in str(caught.value)


def test_points_can_be_logged_from_the_moment_it_is_open(tmp_path: Path) -> None:
    tracker = MlflowTracker(OutputPaths(tmp_path))
    tracker.start_run(None, {})
    tracker.log_points([Point("a", 1.0, 1, 1)])
    assert tracker.history("a") == [Point("a", 1.0, 1, 1)]
