import json

import pytest

from ksuit_runner.errors import ResumeError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.stored_run import (
    Launch,
    add_to_index,
    find_local,
    no_run_in,
    read_config,
    read_launch,
    store,
    unknown_run,
)

FIRST, SECOND, THIRD = "0123456789abcdef", "0123456fffffffff", "aaaabbbbccccdddd"


@pytest.fixture
def paths(tmp_path):
    """An output folder with three runs; the last one is a fork that did not begin."""
    paths = OutputPaths(tmp_path / "outputs")
    for run_id, name, mode in (
        (FIRST, "calm-owl", "train"),
        (SECOND, "wild-fox", "train"),
        (THIRD, "eval", "fork"),
    ):
        PathProvider(paths.output_dir, run_id).run_dir.mkdir(parents=True)
        add_to_index(paths, run_id, name, mode)
    return paths


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (FIRST, FIRST),
        ("01234567", FIRST),
        ("0123456f", SECOND),
        ("aaaabb", THIRD),
        ("calm-owl", FIRST),
        ("last", SECOND),
        ("aaaab", None),
        ("bbbbcccc", None),
        ("calm", None),
    ],
)
def test_what_a_person_means(paths, query, found):
    assert find_local(paths, query) == found


@pytest.mark.parametrize("query", ["0123456", "twin"])
def test_several_runs_are_an_error_that_lists_them(paths, query):
    for run_id in (FIRST, SECOND):
        add_to_index(paths, run_id, "twin", "train")
    with pytest.raises(ResumeError, match=rf"'{query}' matches 2 runs: {FIRST}, {SECOND}"):
        find_local(paths, query)


def test_a_run_that_is_not_in_the_index_is_found_by_its_folder(paths):
    paths.index.unlink()
    assert find_local(paths, "01234567") == FIRST
    assert find_local(paths, "last") is None


def test_a_run_whose_folder_is_gone_is_not_found(paths):
    PathProvider(paths.output_dir, SECOND).run_dir.rmdir()
    assert find_local(paths, "wild-fox") is None
    assert find_local(paths, "last") == FIRST


def test_a_torn_line_of_the_index_is_passed_over(paths):
    with paths.index.open("a") as file:
        file.write('{"run_id": "01')
    assert find_local(paths, "last") == SECOND
    assert find_local(paths, "calm-owl") == FIRST


def test_an_index_continues_after_a_torn_line(paths):
    with paths.index.open("a") as file:
        file.write('{"run_id": "01')
    PathProvider(paths.output_dir, "feedfeedfeed").run_dir.mkdir()
    add_to_index(paths, "feedfeedfeed", "new", "train")
    assert find_local(paths, "new") == "feedfeedfeed"


def test_looking_creates_nothing(tmp_path):
    paths = OutputPaths(tmp_path / "outputs")
    assert find_local(paths, "last") is None
    assert "there is no run in" in str(unknown_run(paths, "last", "resume"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("here", ["project/conf", "."])
def test_a_folder_around_that_has_runs_is_named(tmp_path, monkeypatch, here):
    (tmp_path / "project" / "conf").mkdir(parents=True)
    paths = OutputPaths(tmp_path / "project" / "outputs")
    PathProvider(paths.output_dir, FIRST).run_dir.mkdir(parents=True)
    add_to_index(paths, FIRST, "mine", "train")
    monkeypatch.chdir(tmp_path / here)
    message = str(unknown_run(OutputPaths("outputs"), "mine", "resume"))
    assert message.endswith(f"{paths.output_dir} has some: cd {tmp_path / 'project'}")
    elsewhere = OutputPaths(tmp_path.parent / "outputs")
    assert no_run_in(elsewhere) == f"there is no run in {elsewhere.output_dir}"


@pytest.mark.parametrize(
    ("query", "hint"),
    [
        ("calm-wol", "Did you mean 'calm-owl'?"),
        ("lst", "Did you mean 'last'?"),
        ("0123456789abcedf", f"Did you mean '{FIRST}'?"),
        ("zzz", "3 runs exist (an id needs at least 6 characters); 'last' is the newest"),
        ("zzzzzzzz", "3 runs exist; 'last' is the newest"),
    ],
)
def test_an_unknown_run_is_explained(paths, query, hint):
    assert str(unknown_run(paths, query, "fork")).startswith(f"fork={query}: there is no such run in ")
    assert hint in str(unknown_run(paths, query, "fork"))


def test_a_folder_below_the_working_directory_is_named_as_a_person_would(paths, monkeypatch):
    monkeypatch.chdir(paths.output_dir.parent)
    assert "no such run in outputs." in str(unknown_run(paths, "calm-wol", "resume"))


def test_config_and_launch_are_stored_and_read_back(paths):
    run = PathProvider(paths.output_dir, FIRST)
    config = {"lr": 0.1, "model": {"rate": 0.1, "dims": [1, 2]}}
    launch = Launch("ksuit-runner lr=0.1", ["lr=0.1"], "fork", SECOND)
    store(run, config, launch)
    assert read_config(run) == config
    assert read_launch(run) == launch
    assert json.loads(run.launch.read_text())["origin"] == SECOND
