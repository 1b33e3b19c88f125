import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.tracker import mlflow_database
from ksuit_runner.tracker import mlflow_store as embedded
from ksuit_runner.tracker.base import RUN_ID_TAG, START_TAG, EndStatus
from ksuit_runner.tracker.mlflow import MlflowTracker
from ksuit_runner.tracker.mlflow_database import unsafe_and_quick

LOCAL_ID = "0123456789abcdef" * 2


@pytest.fixture
def other_tables(paths: OutputPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables lack a column that the statements name, as they may in a later version of MLflow."""
    embedded.open_store(paths)
    monkeypatch.setitem(mlflow_database._COLUMNS, "runs", {"run_uuid", "artifact_root"})


def _registered_late(paths: OutputPaths) -> MlflowTracker:
    tracker = MlflowTracker(paths)
    tracker.start_run("late", {START_TAG: LOCAL_ID, RUN_ID_TAG: LOCAL_ID}, start_time=1)
    return tracker


def _dump(paths: OutputPaths) -> list[str]:
    with closing(sqlite3.connect(paths.database)) as database:
        return list(database.iterdump())


def test_mlflow_finds_the_files_of_a_run_that_was_registered_late(paths: OutputPaths) -> None:
    tracker, run = _registered_late(paths), PathProvider(paths.output_dir, LOCAL_ID)
    run.artifacts_dir.mkdir(parents=True)
    run.config.touch()
    assert tracker.run_id != LOCAL_ID
    assert [file.path for file in tracker._client.list_artifacts(tracker.run_id)] == ["config.yaml"]


def test_with_other_tables_a_run_that_was_registered_late_works_without_them(
    paths: OutputPaths, other_tables: None, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = _registered_late(paths)
    assert "does not show the files" in caplog.text and LOCAL_ID in caplog.text
    assert tracker.artifacts_are_local  # so that nothing is copied, and no second folder of the run comes to be
    tracker.end_run(EndStatus.FINISHED)
    (found,) = MlflowTracker(paths).find(LOCAL_ID)
    assert (found.run_id, found.status) == (tracker.run_id, "FINISHED")


def test_with_other_tables_a_moved_folder_is_refused_and_left_as_it_is(
    paths: OutputPaths, other_tables: None, tmp_path: Path
) -> None:
    run_id = MlflowTracker(paths).start_run("moved", {}).run_id
    assert MlflowTracker(paths).resume_run(run_id).name == "moved"
    moved, before = OutputPaths(tmp_path / "elsewhere"), _dump(paths)
    shutil.move(paths.output_dir, moved.output_dir)
    with pytest.raises(TrackerError, match="outside of its folder"):
        MlflowTracker(moved).attach_run(run_id)
    assert _dump(moved) == before
    shutil.move(moved.output_dir, paths.output_dir)
    assert MlflowTracker(paths).resume_run(run_id).name == "moved"


def test_without_the_internals_of_mlflow_its_own_wait_for_a_lock_stays(
    paths: OutputPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    MlflowTracker(paths).find("last")
    mlflow_database._engine.cache_clear()
    monkeypatch.delattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore")
    mlflow_database.limit_lock_wait(f"sqlite:///{paths.database}", 0.3)
    assert mlflow_database._engine.cache_info().currsize == 0


def test_only_the_creation_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    found = []
    with unsafe_and_quick(tmp_path / "a.db"):
        for name in ("a.db", "b.db"):
            (tmp_path / name).touch()
            with create_engine(f"sqlite:///{tmp_path / name}").connect() as connection:
                found.append(connection.execute(text("PRAGMA synchronous")).scalar())
    with create_engine(f"sqlite:///{tmp_path / 'a.db'}").connect() as connection:
        found.append(connection.execute(text("PRAGMA synchronous")).scalar())
    assert found == [0, 2, 2]
