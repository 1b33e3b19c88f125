"""What may lie in a run's folder in place of a file: none of it is followed, waited for, or written through."""

import json
import os
import socket
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from folder_tracker import FolderTracker
from msgspec import Meta

from ksuit_runner.checkpoint.commit import Committer
from ksuit_runner.checkpoint.folders import names
from ksuit_runner.delivery.artifact_mirror import Mirror
from ksuit_runner.delivery.metric_sender import Shipment
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.errors import KsuitError, TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.journal import Journal, read_points
from ksuit_runner.record.stored_run import add_to_index, entries
from ksuit_runner.resume.fetch_run import fetch
from ksuit_runner.system.atomic_files import write_text
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.system.untrusted_files import (
    UnsafeFileError,
    check_folder,
    conform,
    is_below,
    open_file,
    read_json,
    remove,
)
from ksuit_runner.tracker.base import BaseTracker, RunInfo
from ksuit_runner.tracker.mlflow_store import open_store
from ksuit_runner.tracker.noop import NoopTracker
from ksuit_runner.ui.logs import setup_logging
from ksuit_runner.ui.terminal import make_console


class Color(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Part:
    share: float


@dataclass(frozen=True)
class Whole:
    name: Annotated[str, Meta(pattern=r"\A\w+\Z")]
    parts: list[Part] = field(default_factory=list)
    mode: Literal["a", "b"] = "a"
    count: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    anything: Any = None
    color: Color = Color.RED


def test_a_record_is_read_with_what_is_nested_in_it():
    parts, other = (
        [{"share": 1}, {"share": 0.5}],
        {"mode": "b", "count": 3, "sizes": {"x": 1}, "anything": [{}], "color": "blue"},
    )
    expected = Whole("n", [Part(1), Part(0.5)], "b", 3, {"x": 1}, [{}], Color.BLUE)
    found = conform(Whole, {"name": "n", "parts": parts, **other})
    assert found == expected and type(found.color) is Color
    assert conform(Whole, {"name": "n"}) == Whole("n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a b"}, "$.name"),
        ({"name": {"_target_": "x"}}, "Expected `str`, got `object` - at `$.name`"),
        ({"parts": {}}, "Expected `array`, got `object` - at `$.parts`"),
        ({"parts": [{"share": 1}, {"share": True}]}, "Expected `float`, got `bool` - at `$.parts[1].share`"),
        ({"parts": [{}]}, "Object missing required field `share` - at `$.parts[0]`"),
        ({"parts": [3]}, "Expected `object`, got `int` - at `$.parts[0]`"),
        ({"mode": "c"}, "Invalid enum value 'c' - at `$.mode`"),
        ({"color": "green"}, "Invalid enum value 'green' - at `$.color`"),
        ({"color": "x" * 10_000}, "x" * 99),
        ({"color": ["red"]}, "Expected `str`, got `array` - at `$.color`"),
        ({"count": 1.0}, "Expected `int | null`, got `float` - at `$.count`"),
        ({"sizes": {"x": None}}, "Expected `int`, got `null` - at `$.sizes[...]`"),
    ],
)
def test_what_a_record_is_not_is_said_of_its_key(changes, message):
    with pytest.raises(UnsafeFileError) as error:
        conform(Whole, {"name": "n", **changes})
    assert str(error.value).startswith("does not fit its schema: ")
    assert message in str(error.value) and len(str(error.value)) < 400


def test_a_record_is_an_object_with_all_that_it_needs():
    for value, message in (({}, "missing required field `name`"), ([], "Expected `object`, got `array`")):
        with pytest.raises(UnsafeFileError, match=message):
            conform(Whole, value)


def test_what_a_newer_version_has_added_is_ignored():
    assert conform(Whole, {"name": "n", "more": 1}) == Whole("n")


def lock(path: Path) -> None:
    with RunLock(path):
        pass


RUN = Path("runs/run00000")
WRITERS = {
    "metrics.jsonl": lambda path: Journal(path).close(),
    "runs.jsonl": lambda path: add_to_index(OutputPaths(path.parent), "run00000", "x", "train"),
    "mlflow.db.lock": lambda path: open_store(OutputPaths(path.parent)),
}
READERS = {
    "lock.json": lock,  # is replaced and not written to
    "metrics.jsonl": lambda path: list(read_points(path)),
    "tracker.json": lambda path: Outbox.load(PathProvider(path.parents[2], "run00000")),
    "config.yaml": lambda path: read_json(path, path.parent),
    "mlflow.db": lambda path: open_store(OutputPaths(path.parent)),
}


def pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def device(path: Path, victim: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path, victim: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's address may not be long
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)
    os.chdir(here)


IN_PLACE = {
    "link": lambda path, victim: path.symlink_to(victim),
    "hard link": lambda path, victim: path.hardlink_to(victim),
    "pipe": pipe,
    "device": device,
    "socket": listening,
    "folder": lambda path, victim: path.mkdir(),
}


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("untouched")
    yield path
    assert path.read_text() == "untouched"


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_written_through_what_is_no_file_of_its_own(tmp_path, victim, name, kind):
    path = tmp_path / RUN / name
    path.parent.mkdir(parents=True)
    IN_PLACE[kind](path, victim)
    with pytest.raises(KsuitError, match=rf"{name}.* is (a|not a) \w+"):
        WRITERS[name](path)


@pytest.mark.parametrize("kind", [kind for kind in IN_PLACE if kind != "hard link"])
@pytest.mark.parametrize("name", READERS)
def test_nothing_is_read_that_is_no_file(tmp_path, victim, name, kind):
    path = tmp_path / RUN / name
    path.parent.mkdir(parents=True)
    IN_PLACE[kind](path, victim)
    with pytest.raises((KsuitError, UnsafeFileError), match=r"is (a|not a) \w+"):
        READERS[name](path)


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_what_is_replaced_is_replaced_and_not_written_through(tmp_path, victim, kind):
    for name in (".x.json.tmp", "x.json"):
        IN_PLACE[kind](tmp_path / name, victim)
    write_text(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").read_text() == "new"
    IN_PLACE[kind](tmp_path / ".metrics.sent.tmp", victim)
    journal = Journal(tmp_path / "metrics.jsonl")
    Shipment(journal, tmp_path / "metrics.sent", NoopTracker())
    journal.close()
    assert (tmp_path / "metrics.sent").read_text() == "0"


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_log_that_is_no_file_is_left_alone(tmp_path, victim, kind):
    IN_PLACE[kind](tmp_path / "run.log", victim)
    with setup_logging(tmp_path / "run.log", make_console()) as logger:
        logger.warning("said")


def test_a_folder_holds_files_and_folders_only(tmp_path, victim):
    run = tmp_path / "run00000"
    (run / "artifacts" / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("")
    (run / "artifacts" / "newest").symlink_to("checkpoints")
    check_folder(run)
    for kind in ("link", "pipe", "device", "socket"):
        path = run / "artifacts" / "checkpoints" / "latest"
        IN_PLACE[kind](path, victim)
        with pytest.raises(KsuitError, match=r"latest is (a link that leaves|neither)"):
            check_folder(run)
        path.unlink()
    (run / "artifacts" / "model").hardlink_to(victim)  # is replaced and never written to
    check_folder(run)
    (run / "run.log").hardlink_to(victim)
    with pytest.raises(KsuitError, match="run.log is a hard link"):
        check_folder(run)
    (tmp_path / "other").symlink_to(run)
    with pytest.raises(KsuitError, match="other is a link"):
        check_folder(tmp_path / "other")


def test_the_link_is_removed_and_not_what_it_leads_to(tmp_path, victim):
    (tmp_path / "link").symlink_to(victim.parent)
    remove(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()


def test_an_endless_file_and_an_endless_depth_end(tmp_path):
    for text, reason in ((" " * 2_000_000, "bytes"), ("[" * 200_000, "nested"), ("é\ud800", "read")):
        (tmp_path / "x.json").write_bytes(text.encode(errors="surrogatepass"))
        with pytest.raises(UnsafeFileError, match=reason):
            read_json(tmp_path / "x.json", tmp_path)


def test_descriptors_of_what_is_refused_are_closed(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(UnsafeFileError):
            open_file(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "~/x", "", "a\n", "checkpoints/../..", ".", "\0"])
def test_what_a_list_of_uploads_names_outside_is_not_deleted(tmp_path, path):
    assert not is_below(path)
    paths = PathProvider(tmp_path, "run00000")
    paths.artifacts_dir.mkdir(parents=True)
    paths.uploaded.write_text(json.dumps({path: "1", "checkpoints/E1_U2_S3": 1}))
    tracker = FolderTracker(tmp_path / "there")
    Mirror(tracker, paths, lambda: True).update()
    assert tracker.log == ["-checkpoints/E1_U2_S3"]


def test_a_list_of_uploads_may_be_anything(tmp_path):
    paths = PathProvider(tmp_path, "run00000")
    paths.artifacts_dir.mkdir(parents=True)
    for text in ("", "[]", "3", "[" * 100_000, '{"a": []}'):
        paths.uploaded.write_text(text)
        Mirror(FolderTracker(tmp_path / "there"), paths, lambda: True).update()


def test_a_store_that_gives_a_new_run_an_id_that_is_taken_is_refused(tmp_path):
    from ksuit_runner.delivery.recorded_tracker import RecordedTracker

    class Repeats(NoopTracker):
        def start_run(self, *args, **kwargs):
            super().start_run(*args, **kwargs)
            return BaseTracker.run.fget(self).__class__("run00000", "x")

    paths = PathProvider(tmp_path, "run00000")
    paths.artifacts_dir.mkdir(parents=True)
    with pytest.raises(TrackerError, match="the id of one in the output folder: run00000"):
        RecordedTracker(Repeats(), OutputPaths(tmp_path)).start_run(None, {})


class Hostile(NoopTracker):
    """A server that hands out what it likes under the names of a run's files."""

    def __init__(self, run_id, kind, victim):
        super().__init__()
        self.info, self.kind, self.victim = RunInfo(run_id, "x"), kind, victim

    def find(self, query):
        return [self.info]

    def download(self, artifact_path, destination, run_id=None):
        destination.mkdir(parents=True, exist_ok=True)
        path = destination / artifact_path
        IN_PLACE[self.kind](path, self.victim)
        return path


@pytest.mark.parametrize("kind", ["link", "pipe", "device", "socket"])
def test_what_a_server_hands_out_is_no_run_if_it_is_no_files(tmp_path, victim, kind):
    outputs = OutputPaths(tmp_path / "o")
    with pytest.raises(KsuitError, match="is (a link|neither)"):
        fetch(Hostile("run00000", kind, victim), outputs, "x")
    assert not outputs.runs_dir.exists()
    for run_id in ("../run", "a\nb", "", "x" * 200, "C:\\x", "a/b", "\uff52un"):
        with pytest.raises(KsuitError, match="is not a run id"):
            fetch(Hostile(run_id, kind, victim), outputs, "x")


def test_looking_at_runs_changes_nothing_behind_a_link(tmp_path):
    victim = tmp_path / "victim"
    (victim / "artifacts" / "checkpoints" / ".E1_U2_S3.old").mkdir(parents=True)
    outputs = OutputPaths(tmp_path / "o")
    outputs.runs_dir.mkdir(parents=True)
    (outputs.runs_dir / "run00000").symlink_to(victim)
    (outputs.runs_dir / "run11111").mkdir()
    (outputs.runs_dir / "run11111" / "artifacts").symlink_to(victim / "artifacts")
    for run_id in ("run00000", "run11111"):
        add_to_index(outputs, run_id, "x", "train")
        Committer(PathProvider(outputs.output_dir, run_id)).recover()
        assert names(PathProvider(outputs.output_dir, run_id)) == []
    assert [entry.run_id for entry in entries(outputs)] == ["run11111"]
    assert [path.name for path in (victim / "artifacts" / "checkpoints").iterdir()] == [".E1_U2_S3.old"]
