"""Event files: what TensorBoard itself reads from them, and that every point is in them once, whatever happens."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'ksuit_runner[tensorboard]'")

from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from ksuit_runner.delivery.recorded_tracker import RecordedTracker
from ksuit_runner.delivery.recording import Recording
from ksuit_runner.errors import ConfigError, LostRunError, TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.point import Point
from ksuit_runner.tracker.base import RUN_ID_TAG, DatasetInfo, EndStatus
from ksuit_runner.tracker.tensorboard import TensorboardTracker

POINTS = [
    Point("loss/train", 0.1, 1, 1_700_000_000_123),
    Point("loss/test", 1e300, 1, 1_700_000_000_123),
    Point("loss/train", math.nan, 2, 1_700_000_001_001),
    Point("loss/train", -math.inf, 3, 1_700_000_001_002),
]


def outputs(tmp_path: Path) -> OutputPaths:
    return OutputPaths(tmp_path / "outputs")


def started(tmp_path: Path) -> TensorboardTracker:
    tracker = TensorboardTracker(outputs(tmp_path))
    tracker.start_run("digits", {"author": "me"}, "parent", 1_700_000_000_000)
    return tracker


def resumed(tmp_path: Path, run_id: str) -> TensorboardTracker:
    tracker = TensorboardTracker(outputs(tmp_path))
    tracker.resume_run(run_id)
    return tracker


def folder(tmp_path: Path, run_id: str) -> Path:
    return PathProvider(tmp_path / "outputs", run_id).tensorboard_dir


def read(tmp_path: Path, run_id: str) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder(tmp_path, run_id)), {"tensors": 0})
    return accumulator.Reload()


def steps(tmp_path: Path, run_id: str, key: str = "loss/train") -> list[int]:
    return [event.step for event in read(tmp_path, run_id).Tensors(key)]


def same(found: list[Point], expected: list[Point]) -> bool:
    return str(found) == str(expected)  # a NaN does not equal itself


def test_tensorboard_reads_what_is_recorded(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    tracker.log_params({"lr": "0.1", "model._target_": "a|b", "fast": "True"})
    tracker.log_inputs([DatasetInfo("train", "training", "c0ffee", "somewhere")])
    tracker.set_tags({"command": "x"})
    tracker.set_tags({"command": "other"}, "another run")
    tracker.log_points(POINTS)
    tracker.end_run(EndStatus.FAILED, 1_700_000_009_000)
    found = read(tmp_path, tracker.run_id)
    events = found.Tensors("loss/train")
    assert [(event.step, event.wall_time) for event in events] == [
        *((1, 1_700_000_000.123), (2, 1_700_000_001.001), (3, 1_700_000_001.002))
    ]
    values = [event.tensor_proto.float_val[0] for event in events]
    assert values[0] == pytest.approx(0.1) and math.isnan(values[1]) and values[2] == -math.inf
    assert found.SummaryMetadata("loss/train").plugin_data.plugin_name == "scalars"
    config, tags, status = (
        found.Tensors(f"ksuit/{name}")[-1].tensor_proto.string_val[0].decode() for name in ("config", "tags", "status")
    )
    assert r"| `model._target_` | `a\|b` |" in config and "| `command` | `x` |" in tags and "FAILED" in status
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["lr"].number_value == 0.1 and hparams["fast"].bool_value and hparams["model._target_"].string_value
    assert tracker.where() == f"TensorBoard, see it with:\n  tensorboard --logdir {tmp_path / 'outputs' / 'runs'}"


def test_points_are_read_back_exactly(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    tracker.log_points(POINTS)
    other = TensorboardTracker(outputs(tmp_path))
    assert other.last_steps(tracker.run_id) == {"loss/train": 3, "loss/test": 1}
    assert same(other.history("loss/train", tracker.run_id), [POINTS[0], *POINTS[2:]])
    assert same(other.history("loss/test", tracker.run_id), POINTS[1:2])
    assert other.history("nothing", tracker.run_id) == [] == list(other.last_steps("unknown"))


def test_a_resumed_run_has_every_point_once(tmp_path: Path) -> None:
    first = started(tmp_path)
    first.log_params({"lr": "0.1"})
    first.log_points(POINTS)
    first.log_points(POINTS)
    again = resumed(tmp_path, first.run_id)  # as after a kill: nothing was closed
    assert (again.run.name, again.run.tags["author"], again.run.parent_run_id) == ("digits", "me", "parent")
    again.log_params({"lr": "0.2", "seed": "1"})
    again.log_points(POINTS)
    again.log_points([*POINTS[2:], Point("loss/train", 4.0, 4, 1_700_000_001_003)])
    assert steps(tmp_path, first.run_id) == [1, 2, 3, 4]
    again.log_points([Point("loss/train", 5.0, 2, 1_700_000_002_000)])  # the evaluation of an older checkpoint
    assert sorted(steps(tmp_path, first.run_id)) == [1, 2, 2, 3, 4]
    text = read(tmp_path, first.run_id).Tensors("ksuit/config")[-1].tensor_proto.string_val[0]
    assert b"| `lr` | `0.1` |" in text and b"| `seed` | `1` |" in text


@pytest.mark.parametrize("lost", [1, 20, 45, 46, 47, 60])
def test_what_a_killed_process_has_torn_is_written_again(tmp_path: Path, lost: int) -> None:
    first = started(tmp_path)
    batch = [Point("loss", step / 3, step, 1_700_000_000_000 + step) for step in range(10)]
    first.log_points(batch)
    (path,) = folder(tmp_path, first.run_id).glob("events*")
    os.truncate(path, path.stat().st_size - lost)
    again = resumed(tmp_path, first.run_id)
    again.log_points(batch)
    again.log_points([Point("loss", 9.0, 10, 1_700_000_009_000)])
    assert [point.step for point in again.history("loss")] == list(range(11))
    assert steps(tmp_path, first.run_id, "loss") == list(range(11))


def test_what_a_full_disk_does_not_take_is_written_when_there_is_room(tmp_path, monkeypatch) -> None:
    tracker = started(tmp_path)
    tracker.log_points(POINTS[:2])
    with monkeypatch.context() as patched:
        write = os.write
        patched.setattr(os, "write", lambda file, content: write(file, content[:-50]))
        for _ in range(2):
            with pytest.raises(TrackerError, match=r"^TensorBoard's files: only a part of \d+ bytes could be written$"):
                tracker.log_points(POINTS)
    tracker.log_points(POINTS)
    assert same(tracker.history("loss/train"), [POINTS[0], *POINTS[2:]]) and len(tracker.history("loss/test")) == 1
    assert steps(tmp_path, tracker.run_id) == [1, 2, 3]


def test_a_run_has_the_id_of_its_folder(tmp_path: Path) -> None:
    tracker = TensorboardTracker(outputs(tmp_path))
    info = tracker.start_run("x", {RUN_ID_TAG: "0" * 32}, start_time=1)
    assert info.run_id == info.local_id == "0" * 32
    tracker.log_points(POINTS)
    again = TensorboardTracker(outputs(tmp_path)).start_run("y", {RUN_ID_TAG: "0" * 32}, start_time=2)
    assert (again.name, again.start_time) == ("x", 1)
    assert len({TensorboardTracker(outputs(tmp_path)).start_run(None, {}).run_id for _ in range(3)}) == 3


def test_what_is_missing_or_strange_gets_an_error_of_one_line(tmp_path: Path) -> None:
    tracker = TensorboardTracker(outputs(tmp_path))
    for bind in (tracker.attach_run, tracker.resume_run):
        with pytest.raises(
            LostRunError, match=r"^there are no files of run run00000 for TensorBoard in .*tensorboard$"
        ):
            bind("run00000")
    here = folder(tmp_path, "run00000")
    here.mkdir(parents=True)
    for text in ("", "[]", '{"run_id": 3}', '{"run_id": "run00001", "name": "x", "start_time": 1}', "[" * 10_000):
        (here / "run.json").write_text(text)
        with pytest.raises(TrackerError) as raised:
            tracker.attach_run("run00000")
        assert "\n" not in str(raised.value)
    (here / "run.json").unlink()
    here.rmdir()
    here.symlink_to(tmp_path)
    with pytest.raises(TrackerError, match=r"^TensorBoard's files: is a link$"):
        tracker.start_run("x", {RUN_ID_TAG: "run00000"})
    with pytest.raises(TrackerError, match="not a run id"):
        tracker.attach_run("../x")
    for key in ("", "ksuit/x", "_hparams_/x"):
        with pytest.raises(ConfigError):
            tracker.check_key(key)
    tracker.check_key("loss/train")


def test_a_run_whose_files_are_gone_is_written_again_on_request(tmp_path: Path) -> None:
    tracker = RecordedTracker(TensorboardTracker(outputs(tmp_path)), outputs(tmp_path))
    run_id = tracker.start_run("digits", {}).run_id
    paths = PathProvider(tmp_path / "outputs", run_id)
    journal = Journal(paths.journal)
    for step in range(3):
        journal.append(step, {"loss/train": float(step)})
    journal.close()
    tracker.end_run(EndStatus.FINISHED)
    Recording(tracker.store, paths).deliver_all()
    shutil.rmtree(paths.tensorboard_dir)
    with pytest.raises(LostRunError, match="register_anew=true"):
        Recording(TensorboardTracker(outputs(tmp_path)), paths).deliver_all()
    again = Recording(TensorboardTracker(outputs(tmp_path)), paths)
    assert again.forget_lost()
    again.deliver_all()
    assert steps(tmp_path, run_id) == [0, 1, 2]


def test_without_the_package_it_says_how_to_install_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    message = r"^'tensorboard' is not installed. pip install 'ksuit_runner\[tensorboard\]'$"
    with pytest.raises(ConfigError, match=message):
        TensorboardTracker(outputs(tmp_path))
    assert not (tmp_path / "outputs").exists()


def test_torch_is_not_imported(tmp_path: Path) -> None:
    script = f"""
import sys
from ksuit_runner.paths import OutputPaths
from ksuit_runner.record.point import Point
from ksuit_runner.tracker.tensorboard import TensorboardTracker
tracker = TensorboardTracker(OutputPaths({str(tmp_path)!r}))
tracker.start_run("x", {{}})
tracker.log_params({{"lr": "0.1"}})
tracker.log_points([Point("loss", 0.1, 1, 1)])
tracker.end_run("FINISHED")
assert tracker.history("loss")
print(sorted({{"torch", "tensorflow", "mlflow"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
