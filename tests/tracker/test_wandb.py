"""W&B without a server: what is in its own files, that every point is in them once, and that nothing outlives a run."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("wandb", reason="wandb is not installed: pip install 'ksuit_runner[wandb]'")

from ksuit_runner.errors import ConfigError, TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.file_formats import histogram_files, image_files, table_files, text_files
from ksuit_runner.record.point import LoggedFile, Point
from ksuit_runner.system.untrusted_files import check_folder
from ksuit_runner.tracker.base import RUN_ID_TAG, DatasetInfo, EndStatus
from ksuit_runner.tracker.wandb import WandbTracker
from ksuit_runner.tracker.wandb_files import RecordReader, logged_in

POINTS = [
    Point("loss/train", 0.1, 1, 1_700_000_000_123),
    Point("loss/test", 1e300, 1, 1_700_000_000_123),
    Point("loss/train", math.nan, 2, 1_700_000_001_001),
    Point("loss/train", -math.inf, 3, 1_700_000_001_002),
]

KILLED = """
import os, signal, sys
from ksuit_runner.paths import OutputPaths
from ksuit_runner.record.point import Point
from ksuit_runner.tracker.base import RUN_ID_TAG
from ksuit_runner.tracker.wandb import WandbTracker
tracker = WandbTracker(OutputPaths(sys.argv[1]), mode="offline")
tracker.start_run("x", {RUN_ID_TAG: "run00000"}, "parent")
tracker.log_params({"lr": "0.1"})
tracker.log_points([Point("loss", 0.5, 1, 1000), Point("loss", 0.25, 2, 2000)])
tracker._open_run.log({"loss": 0.125, "update": 3, "_timestamp": 3.0})  # not acknowledged
print(sorted({"torch", "mlflow"} & set(sys.modules)), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


REPLACED = """
import sys
import psutil
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.record.point import Point
from ksuit_runner.tracker.wandb import WandbTracker
tracker = WandbTracker(OutputPaths(sys.argv[1]), mode="offline")
tracker.start_run("x", {})
tracker.log_points([Point("loss", 0.5, 1, 1000)])
for child in psutil.Process().children():
    child.kill()
    child.wait()
points = [Point("loss", 0.5, 1, 1000), Point("loss", 0.25, 2, 2000)]
try:
    tracker.log_points(points)
except TrackerError:
    tracker.log_points(points)
tracker.end_run("FINISHED")
print([point.step for point in tracker.history("loss")])
assert not psutil.Process().children()
"""


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch, tmp_path):
    """Have W&B find no account of the machine, and check that it leaves no process."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    assert not [child for child in psutil.Process().children() if "wandb" in child.name()]


def outputs(tmp_path: Path) -> OutputPaths:
    return OutputPaths(tmp_path / "outputs")


def offline(tmp_path: Path) -> WandbTracker:
    return WandbTracker(outputs(tmp_path), "digits", "me", "offline")


def records(tmp_path: Path, run_id: str) -> list:
    files = sorted(PathProvider(tmp_path / "outputs", run_id).wandb_dir.glob("*/*.wandb"))
    return [record for file in files for record in RecordReader(file).read()]


def of_kind(found: list, kind: str) -> list:
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def same(found: list[Point], expected: list[Point]) -> bool:
    return str(found) == str(expected)  # a NaN does not equal itself


def test_images_tables_and_histograms_are_in_its_files_once(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    info = tracker.start_run("x", {})
    contents = [
        image_files("a/b", 3, np.ones((4, 5))),
        table_files("rows", 3, ("x", "y"), [(1, "a"), (None, 2)]),
        histogram_files("spread", 4, [1.0, 2.0], 2),
        histogram_files("fine", 4, [1.0, 2.0], 600),  # more bins than W&B takes
        text_files("note", 4, "text"),
    ]
    root = PathProvider(tmp_path / "outputs", info.run_id).artifacts_dir
    for path, content in (item for files in contents for item in files.items()):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    keys = ["images/a/b", "tables/rows", "histograms/spread", "histograms/fine", "texts/note"]
    files = [
        LoggedFile(key, next(iter(item)), step, 1000 * step)
        for key, item, step in zip(keys, contents, (3, 3, 4, 4, 4), strict=True)
    ]
    gone = LoggedFile("images/gone", "images/gone.png", 4, 4000)
    for _ in range(2):
        tracker.log_files([*files, gone])
        tracker.log_points([Point("loss", 0.5, 3, 3000)])
        tracker._recorded = None  # as in another process
    tracker.end_run(EndStatus.FINISHED)
    logged = [item for record in records(tmp_path, info.run_id) for item in logged_in(record)]
    assert sorted((item.key, item.step) for item in logged) == [
        ("histograms/spread", 4), ("images/a/b", 3), ("loss", 3), ("tables/rows", 3)
    ]  # fmt: skip
    assert tracker.last_steps() == {"loss": 3}


def test_what_is_recorded_is_in_its_files(tmp_path: Path) -> None:
    tracker = offline(tmp_path)
    assert tracker.where() == "W&B (offline), upload it with:\n  wandb sync"
    info = tracker.start_run("x", {"author": "me"}, "parent")
    folder = PathProvider(tmp_path / "outputs", info.run_id).wandb_dir
    assert tracker.where() == f"W&B (offline), upload it with:\n  wandb sync {folder}/*run-*"
    tracker.log_params({"lr": "0.1", "model._target_": "x"})
    tracker.log_inputs([DatasetInfo("train", "training", "c0ffee", "somewhere")])
    tracker.set_tags({"command": "y", "ksuit.tags": "a, b", "ksuit.notes": "z"})
    tracker.log_points(POINTS)
    tracker.log_points(POINTS)
    tracker.log_points([Point("loss/train", 5.0, 2, 1_700_000_002_000)])  # the evaluation of an older checkpoint
    assert tracker.last_steps() == {"loss/train": 3, "loss/test": 1}
    assert same(tracker.history("loss/test"), POINTS[1:2])
    tracker.end_run(EndStatus.KILLED)
    found = records(tmp_path, info.run_id)
    (*_, run), (ended,) = of_kind(found, "run"), of_kind(found, "exit")
    assert (run.notes, list(run.tags)) == ("z", ["a", "b"])
    assert (run.run_id, run.run_group, run.display_name, run.project) == (info.run_id, "parent", "x", "digits")
    assert ended.exit_code == 1
    config = {item.key: json.loads(item.value_json) for record in of_kind(found, "config") for item in record.update}
    tags = {"author": "me", "command": "y", "ksuit.tags": "a, b", "ksuit.notes": "z"}
    assert (config["lr"], config["model._target_"], config["tags"]) == (0.1, "x", tags)
    assert config["datasets"]["train"].startswith("training, c0ffee")
    metrics = of_kind(found, "metric")
    assert {metric.glob_name or metric.name: metric.step_metric for metric in metrics} == {"update": "", "*": "update"}
    steps = [[point.step for point in logged_in(record)] for record in found]
    assert [step for step in steps if step] == [[1, 1], [2], [3], [2]]


def test_a_killed_run_is_resumed_with_every_point_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "outputs")]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "[]\n"), killed.stderr
    check_folder(PathProvider(tmp_path / "outputs", "run00000").run_dir)
    tracker = offline(tmp_path)
    assert (tracker.attach_run("run00000").name, tracker.run.parent_run_id) == ("x", "parent")
    assert not of_kind(records(tmp_path, "run00000"), "exit")
    tracker.resume_run("run00000")
    tracker.log_params({"lr": "0.2"})
    tracker.log_points([Point("loss", 2.0**-step, step, 1000 * step) for step in range(1, 6)])
    tracker.end_run(EndStatus.FINISHED)
    assert tracker.history("loss") == [Point("loss", 2.0**-step, step, 1000 * step) for step in range(1, 6)]
    check_folder(PathProvider(tmp_path / "outputs", "run00000").run_dir)
    found = records(tmp_path, "run00000")
    assert [run.run_id for run in of_kind(found, "run")] == ["run00000"] * 2
    assert [record.exit_code for record in of_kind(found, "exit")] == [0]
    config = {item.key: item.value_json for item in of_kind(found, "run")[1].config.update}
    assert config["lr"] == "0.1"


def test_several_runs_share_a_process_that_ends_with_the_last(tmp_path: Path) -> None:
    parent, job = offline(tmp_path), offline(tmp_path)
    parent.start_run("parent", {RUN_ID_TAG: "parent00"}, start_time=1)
    job.start_run("job", {RUN_ID_TAG: "job00000"}, "parent00", start_time=1)
    job.log_points(POINTS)
    job.end_run(EndStatus.FINISHED)
    parent.log_points(POINTS[:1])
    parent.end_run(EndStatus.FINISHED)
    assert len(job.history("loss/train")) == 3 and len(parent.history("loss/train")) == 1


def test_without_an_account_or_a_server_there_is_an_error_of_one_line(tmp_path, monkeypatch) -> None:
    tracker = WandbTracker(outputs(tmp_path), mode="online", timeout_s=1)
    with pytest.raises(TrackerError, match="^W&B: there is no API key. Set WANDB_API_KEY, run `wandb login`"):
        tracker.start_run("x", {})
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(TrackerError, match=r"^W&B: .*") as raised:
        tracker.start_run("x", {})
    assert "\n" not in str(raised.value) and time.monotonic() - start < 20


def service() -> psutil.Process:
    (found,) = (child for child in psutil.Process().children() if "wandb" in child.name())
    return found


def test_what_its_suspended_process_has_got_is_not_sent_again(tmp_path) -> None:
    tracker = WandbTracker(outputs(tmp_path), mode="offline", timeout_s=0.3)
    tracker.start_run("x", {})
    tracker.log_points(POINTS[:2])
    service().send_signal(signal.SIGSTOP)
    try:
        for _ in range(2):
            with pytest.raises(TrackerError, match=r"^W&B's process has not written its file for 0\.3 s$"):
                tracker.log_points(POINTS)
    finally:
        service().send_signal(signal.SIGCONT)
    tracker._timeout_s = 5
    tracker.log_points(POINTS)
    tracker.end_run(EndStatus.FINISHED)
    assert same(tracker.history("loss/train"), [POINTS[0], *POINTS[2:]])


def test_its_process_is_replaced_when_it_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REPLACED, str(tmp_path / "outputs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[1, 2]\n"), done.stderr


def test_names_and_a_missing_package_are_explained(tmp_path, monkeypatch) -> None:
    for key in ("", "update", "_step"):
        with pytest.raises(ConfigError, match="W&B needs names"):
            offline(tmp_path).check_key(key)
    offline(tmp_path).check_key("loss/train")
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = r"^'wandb' is not installed. pip install 'ksuit_runner\[wandb\]'$"
    with pytest.raises(ConfigError, match=message):
        offline(tmp_path)
    assert not (tmp_path / "outputs").exists()
