import sqlite3
from pathlib import Path

import pytest

from ksuit_runner.errors import TrackerError
from ksuit_runner.tracker.artifact_location import check, folder
from ksuit_runner.tracker.mlflow import MlflowTracker

OWN = Path("/outputs/runs/1/artifacts")


@pytest.mark.parametrize("uri", [str(OWN), f"file://{OWN}", f"file:{OWN}"])
def test_the_own_folder_of_a_run_is_the_usual_place(uri):
    assert folder(uri) == OWN
    check(uri, [OWN], None, has_network=False)


@pytest.mark.parametrize(
    "uri",
    [
        "/etc",
        "file:///etc",
        "file:///outputs/runs/1/artifacts/../../../../etc",
        "/outputs/runs/2/artifacts",
        "outputs/runs/1/artifacts",
        "file://localhost/outputs/runs/1/artifacts%2f..%2f..",
        "C:\\Users\\me",
        "runs:/0123/x",
        "models:/x/1",
        "FILE:///etc",
        "",
    ],
)
def test_a_store_may_name_no_other_folder(uri):
    for has_network in (False, True):
        with pytest.raises(TrackerError, match="outside of its folder"):
            check(uri, [OWN], None, has_network)


def test_a_server_has_files_behind_the_network_and_the_own_database_has_not():
    for uri in ("mlflow-artifacts:/1/artifacts", "s3://bucket/1", "https://host/api/1"):
        check(uri, [OWN], None, has_network=True)
        with pytest.raises(TrackerError):
            check(uri, [OWN], None, has_network=False)


def test_the_user_can_name_another_one(tmp_path):
    check(f"{tmp_path}/1/artifacts", [OWN], str(tmp_path), has_network=True)
    check("plugin://host/a/1", [OWN], "plugin://host/a", has_network=True)
    (tmp_path / "link").symlink_to("/etc")
    for uri in (f"{tmp_path}/../x", f"{tmp_path}/link", f"{tmp_path}x", "plugin://host/a/../b", "plugin://host/ab"):
        with pytest.raises(TrackerError):
            check(uri, [OWN], "plugin://host/a" if uri.startswith("plugin") else str(tmp_path), has_network=True)


def test_a_run_whose_database_names_another_folder_is_not_taken_up(tracker, paths, tmp_path):
    with sqlite3.connect(paths.database) as database:
        database.execute("UPDATE runs SET artifact_uri = ?", (str(tmp_path / "victim"),))
    database.close()
    for method in (MlflowTracker.attach_run, MlflowTracker.resume_run):
        with pytest.raises(TrackerError, match=r"tracker\.artifact_root="):
            method(MlflowTracker(paths), tracker.run_id)
    MlflowTracker(paths, artifact_root=str(tmp_path)).attach_run(tracker.run_id)
