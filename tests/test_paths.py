from pathlib import Path

import pytest

from ksuit_runner.errors import ResumeError
from ksuit_runner.paths import OutputPaths, PathProvider


def test_all_files_lie_under_the_output_folder(tmp_path):
    paths = PathProvider(tmp_path / "outputs", "0123abcd", "E2_U90_S2880")
    files = [value for name, value in vars(paths).items() if not name.startswith("_") and name != "run_id"]
    assert len(files) > 10
    assert all(file.is_relative_to(tmp_path / "outputs") for file in files)
    assert len(set(files)) == len(files)


def test_looking_creates_nothing(tmp_path):
    PathProvider(tmp_path / "outputs", "0123abcd").at_checkpoint("E2_U90_S2880")
    OutputPaths(tmp_path / "outputs")
    assert list(tmp_path.iterdir()) == []


def test_a_relative_folder_means_where_it_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = OutputPaths("outputs")
    monkeypatch.chdir("/")
    assert paths.database == tmp_path / "outputs" / "mlflow.db"


def test_a_folder_beside_or_above_is_named_as_in_a_shell(tmp_path, monkeypatch):
    here = tmp_path / "project" / "scripts"
    here.mkdir(parents=True)
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(here)
    assert OutputPaths("../outputs").output_dir == tmp_path / "project" / "outputs"
    assert OutputPaths(tmp_path / "link" / ".." / "outputs").output_dir == tmp_path / "project" / "outputs"
    assert OutputPaths(tmp_path / "link").output_dir == tmp_path / "link"


def test_a_tilde_is_the_home_folder_as_in_a_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert OutputPaths("~/runs").output_dir == tmp_path / "runs"
    assert OutputPaths("/~/runs").output_dir == Path("/~/runs")


def test_runs_do_not_share_files(tmp_path):
    first, second = PathProvider(tmp_path, "first"), PathProvider(tmp_path, "second")
    assert first.database == second.database
    assert first.runs_dir == second.runs_dir == first.run_dir.parent == second.run_dir.parent
    assert not {first.journal, first.checkpoints_dir, first.lock} & {
        second.journal,
        second.checkpoints_dir,
        second.lock,
    }


def test_a_checkpoint_has_to_be_named(tmp_path):
    paths = PathProvider(tmp_path, "first")
    assert paths.at_checkpoint("E2_U90_S2880").checkpoint_dir == paths.checkpoints_dir / "E2_U90_S2880"
    with pytest.raises(AssertionError, match="name no checkpoint"):
        _ = paths.checkpoint_dir


@pytest.mark.parametrize("run_id", ["", "..", "a/b", "a\\b"])
def test_a_run_id_leads_nowhere_else(tmp_path, run_id):
    with pytest.raises(ResumeError):
        PathProvider(tmp_path, run_id)
