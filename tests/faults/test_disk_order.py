"""A power cut at any operation leaves the old or the new version, and a run resumes exactly from either."""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command import checkpoint_bytes
from disk import SURVIVALS, Disk, Step, Tree, write_tree
from pieces import piece
from stored_checkpoint import store_checkpoint
from worlds import in_threads

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint import writer as checkpoint
from ksuit_runner.checkpoint.commit import Committer, InPlace
from ksuit_runner.checkpoint.folders import damage, has_traces, names, read_tags
from ksuit_runner.checkpoint.format import pack_state, read_newest
from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.delivery.artifact_mirror import Mirror
from ksuit_runner.delivery.delivered import Delivery
from ksuit_runner.delivery.metric_sender import Shipment
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.distributed.world import World
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import CheckpointError
from ksuit_runner.paths import OutputPaths, PathProvider, SweepPaths
from ksuit_runner.record.journal import Journal, JournalReader
from ksuit_runner.record.point import Point
from ksuit_runner.record.stored_run import Launch, add_to_index, entries, read_config, read_launch, store
from ksuit_runner.sweep.job_status import read_ends, record_end
from ksuit_runner.sweep.plan import Job, SweepPlan, add_job, read_jobs, read_plan, store_plan
from ksuit_runner.sweep.run_job import JobResult
from ksuit_runner.sweep.sweep_settings import SweepSettings
from ksuit_runner.system import lock_file
from ksuit_runner.system.atomic_files import commit_folder, make_folder, new_file, renew, sync, write_text
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.tracker.noop import NoopTracker

RUN = "run00000"
OLD, NEW = "E0_U1_S2", "E0_U2_S4"


class Writer(NamedTuple):
    """Something that is written again and again, as version 1, 2, 3; which versions a reader finds, 0 for none."""

    write: Callable[[Path, int], None]
    read: Callable[[Path], set[int]]


def of_text(path: Path) -> int:
    return int(path.read_text()) if path.exists() else 0


def write_new_folder(folder: Path, version: int) -> None:
    (folder / "new").mkdir()
    (folder / "new" / "below").mkdir()
    for path in (folder / "new" / "a", folder / "new" / "below" / "b"):
        path.write_text(str(version))
    make_folder(folder / "parent" / "parent")
    commit_folder(folder / "new", folder / "parent" / "parent" / str(version))


def read_folders(folder: Path) -> set[int]:
    found = sorted((folder / "parent" / "parent").glob("*"))
    for path in found:
        assert (path / "a").read_text() == (path / "below" / "b").read_text() == path.name
    return {len(found)}


def write_checkpoint(folder: Path, version: int) -> None:
    """Write the same position again, as a run does that found it damaged or has another config."""
    tensors = {"model": {"w": torch.tensor(float(version))}, "ema": {"w": torch.zeros(3)}}
    state = {"trainer": {}, "callbacks": {}, "unfinished": None}
    store_checkpoint(PathProvider(folder, RUN), "E1_U2_S4", pack_state(tensors, state), config_hash=str(version))


def read_checkpoint(folder: Path) -> set[int]:
    paths = PathProvider(folder, RUN)
    Committer(paths).recover()
    return {int(read_newest(paths).model["w"]) if names(paths) else 0}


def save_checkpoint(folder: Path, version: int) -> None:
    counter = UpdateCounter(6, 2, max_epochs=100)
    counter.update = version
    writer = CheckpointWriter(PathProvider(folder, RUN), keep_last=1)
    writer.request("best")
    writer.save(counter, {"w": torch.ones(2)}, {"trainer": {}, "callbacks": {}, "unfinished": None}, wait=True)
    writer.close()


def read_saved(folder: Path) -> set[int]:
    """Read the newest checkpoint; what ``latest`` and the tags name has to be there and whole at any moment."""
    paths = PathProvider(folder, RUN)
    Committer(paths).recover()
    if not has_traces(paths):
        return {0}
    named = [paths.latest.read_text().strip()] if paths.latest.exists() else []
    named += json.loads(paths.tags.read_text()).values() if paths.tags.exists() else []
    for name in named:
        folder = paths.checkpoints_dir / name
        assert damage(folder) is None, f"{name}, which is named, is {damage(folder)}"
    return {read_newest(paths).progress.update}


def save_on_two_ranks(folder: Path, version: int) -> None:
    """Write the same position again, of which each rank has a half."""

    def save(world: World) -> None:
        counter = UpdateCounter(6, 2, max_epochs=100)
        counter.update = 2
        writer = CheckpointWriter(PathProvider(folder, RUN), config_hash=str(version), world=world)
        model = {"w": piece(torch.full((4,), float(version)), world.rank, 2)}
        writer.save(counter, model, {"trainer": {}, "callbacks": {}, "unfinished": None}, wait=True)
        writer.close()

    in_threads(2, save)


def read_of_two_ranks(folder: Path) -> set[int]:
    paths = PathProvider(folder, RUN)
    Committer(paths).recover()
    return set(map(int, read_newest(paths).model["w"])) if names(paths) else {0}


def append_to_journal(folder: Path, version: int) -> None:
    journal = Journal(PathProvider(folder, RUN).journal)
    journal.append(version, {"loss": 0.5, "accuracy": 1.0})
    journal.sync()
    journal.close()


def read_journal(folder: Path) -> set[int]:
    journal = Journal(PathProvider(folder, RUN).journal)
    steps = [points[0].step for points, _ in journal.read()]
    journal.close()
    assert steps == list(range(1, len(steps) + 1))
    return {len(steps)}


def sync_as_reader(folder: Path, version: int) -> None:
    """Append to a journal, which the process that reads it makes durable before it sends the points."""
    journal = Journal(PathProvider(folder, RUN).journal)
    journal.append(version, {"loss": 0.5, "accuracy": 1.0})
    JournalReader(journal.path).sync()
    journal.close()


def renew_journal(folder: Path, version: int) -> None:
    """Append to a journal and take it over, as a resume does."""
    append_to_journal(folder, version)
    renew(PathProvider(folder, RUN).journal)


def export_file(folder: Path, version: int) -> None:
    """Write a file that refers to another one, as an ONNX file does to its weights."""
    with new_file(folder / str(version)) as file:
        file.write_text(f"{version}.data")
        (file.parent / f"{version}.data").write_text("weights")


def read_exported(folder: Path) -> set[int]:
    found = [path for path in folder.glob("*") if not path.suffix and not path.name.startswith(".")]
    for path in found:
        assert (folder / path.read_text()).read_text() == "weights"
    return {len(found)}


def store_outbox(folder: Path, version: int) -> None:
    Outbox(RUN, "name", tags={"version": str(version)}).store(PathProvider(folder, RUN))


def read_outbox(folder: Path) -> set[int]:
    box = Outbox.load(PathProvider(folder, RUN))
    return {int(box.tags["version"]) if box else 0}


def store_delivered(folder: Path, version: int) -> None:
    make_folder(PathProvider(folder, RUN).run_dir)
    Delivery("id", version).store(PathProvider(folder, RUN))


def read_delivered(folder: Path) -> set[int]:
    return {Delivery.load(PathProvider(folder, RUN), Outbox(RUN, "name")).version}


def store_uploaded(folder: Path, version: int) -> None:
    paths = PathProvider(folder, RUN)
    make_folder(paths.artifacts_dir)
    write_text(paths.artifacts_dir / f"{version}.txt", "text")
    Mirror(NoopTracker(), paths, lambda: True).adopt()


def read_uploaded(folder: Path) -> set[int]:
    path = PathProvider(folder, RUN).uploaded
    return {len(json.loads(path.read_text())) if path.exists() else 0}


def store_config(folder: Path, version: int) -> None:
    store(PathProvider(folder, RUN), {"seed": version}, Launch(f"ksuit {version}", []))


def read_stored(folder: Path) -> set[int]:
    paths = PathProvider(folder, RUN)
    if not paths.launch.exists():
        return {read_config(paths).seed if paths.config.exists() else 0, 0}
    return {read_config(paths).seed, int(read_launch(paths).command.split()[1])}


def index(folder: Path, version: int) -> None:
    make_folder(PathProvider(folder, f"run0000{version}").run_dir)
    add_to_index(OutputPaths(folder), f"run0000{version}", "name", "train")


def read_index(folder: Path) -> set[int]:
    return {len(entries(OutputPaths(folder)))}


def plan_sweep(folder: Path, version: int) -> None:
    paths = SweepPaths(folder, "sweep000")
    if version == 1:
        store_plan(paths, SweepPlan("plan", "ksuit", [], SweepSettings(), {}, {}), [Job(0, {"lr": "1"}, {"lr": 1})])
    else:
        add_job(paths, Job(version - 1, {"lr": "2"}, {"lr": 2}))
    record_end(paths, JobResult(version - 1, EndStatus.FINISHED, seconds=1.0))


def read_sweep(folder: Path) -> set[int]:
    paths = SweepPaths(folder, "sweep000")
    if not paths.plan.exists():
        return {0}  # without a plan there is no sweep
    assert read_plan(paths).name == "plan"
    jobs = [job.index for job in read_jobs(paths)]
    assert jobs == list(range(len(jobs))) and len(read_ends(paths)) <= len(jobs)
    return {len(jobs), len(read_ends(paths))}


WRITERS = {
    "a text": Writer(lambda folder, n: write_text(folder / "text", str(n)), lambda folder: {of_text(folder / "text")}),
    "a folder": Writer(write_new_folder, read_folders),
    "a checkpoint": Writer(write_checkpoint, read_checkpoint),
    "the newest checkpoint": Writer(save_checkpoint, read_saved),
    "a checkpoint of two ranks": Writer(save_on_two_ranks, read_of_two_ranks),
    "the journal": Writer(append_to_journal, read_journal),
    "the journal, synced by its reader": Writer(sync_as_reader, read_journal),
    "a journal that is taken over": Writer(renew_journal, read_journal),
    "an exported file": Writer(export_file, read_exported),
    "tracker.json": Writer(store_outbox, read_outbox),
    "delivered.json": Writer(store_delivered, read_delivered),
    "uploaded.json": Writer(store_uploaded, read_uploaded),
    "config and launch": Writer(store_config, read_stored),
    "the index": Writer(index, read_index),
    "a sweep": Writer(plan_sweep, read_sweep),
}


class Cuts:
    """Collects what power cuts would leave, without duplicates."""

    def __init__(self) -> None:
        self.trees: dict[frozenset, str] = {}

    def take(self, disk: Disk, when: object) -> list[tuple[str, Tree]]:
        found = [(f"{how}, {when}", tree) for how, tree in disk.after_all_cuts().items()]
        return [(name, tree) for name, tree in found if self._is_new(tree, name)]

    def _is_new(self, tree: Tree, name: str) -> bool:
        return self.trees.setdefault(frozenset(tree.items()), name) is name


@pytest.mark.parametrize("what", WRITERS)
def test_a_power_cut_leaves_the_old_version_or_the_new_one(tmp_path, what):
    writer, cuts, found = WRITERS[what], Cuts(), []
    disk = Disk(tmp_path / "disk", lambda step: found.extend((version, *cut) for cut in cuts.take(disk, step)))
    disk.folder.mkdir()
    with disk:
        for version in (1, 2, 3):
            writer.write(disk.folder, version)
            afterwards = [
                (version, f"{how}, after version {version}", tree) for how, tree in disk.after_all_cuts().items()
            ]
            assert [read(writer, tmp_path / "after", tree) for *_, tree in afterwards] == [{version}] * len(afterwards)
    assert len(found) > 5
    for version, name, tree in found:
        assert read(writer, tmp_path / "cut", tree) <= {version - 1, version}, name


def read(writer: Writer, folder: Path, tree: Tree) -> set[int]:
    shutil.rmtree(folder, ignore_errors=True)
    write_tree(tree, folder)
    return writer.read(folder)


def test_old_checkpoints_are_removed_after_the_new_one_is_durable_and_named(tmp_path):
    removed = []

    def check(step: Step) -> None:
        if step.what in ("unlink", "rmdir") and "checkpoints/E" in step.path:
            removed.append(step.path.split("/")[4])
            left = disk.after_cut(SURVIVALS["only what was synced"])
            write_tree(left, tmp_path / str(len(removed)))
            paths = PathProvider(tmp_path / str(len(removed)), RUN)
            assert damage(paths.checkpoints_dir / paths.latest.read_text().strip()) is None
            assert paths.latest.read_text().strip() not in removed

    disk = Disk(tmp_path / "disk", check)
    disk.folder.mkdir()
    with disk:
        for version in (1, 2, 3):
            save_checkpoint(disk.folder, version)
    assert len(set(removed)) == 2


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_commit_is_files_fsync_rename_parent_fsync_and_read_back_before_anything_is_removed(
    tmp_path, monkeypatch, is_packed
):
    """A tiny one is handed over as one file, which stays until what was made of it is read back."""
    if not is_packed:
        monkeypatch.setattr(checkpoint, "TINY", 0)
    save_checkpoint(tmp_path, 1)
    disk = Disk(tmp_path)
    with disk:
        save_checkpoint(tmp_path, 2)
    here = "runs/run00000/artifacts/checkpoints"
    temporary, ready, folder, old = (f"{here}/{name}" for name in (".E0_U2_S4.tmp", ".E0_U2_S4.ready", NEW, OLD))
    written = f"{here}/.E0_U2_S4.unpacked" if is_packed else ready
    files = [f"/{file.name}" for file in (tmp_path / folder).iterdir()]
    assert len(files) == 4

    def at(*step: str) -> int:
        return disk.log.index(Step(*step))

    handed_over, committed = at("rename", temporary, ready), at("rename", written, folder)
    assert not [step for step in disk.log[:handed_over] if step.what == "fsync"], "who writes waits for the disk"
    for file in files:
        assert at("open", temporary + file * (not is_packed)) < handed_over
        assert not is_packed or handed_over < at("open", written + file) < at("fsync", written + file)
    assert handed_over < min(at("fsync", written + file) for file in ["", *files])
    assert max(at("fsync", written + file) for file in ["", *files]) < committed
    durable = disk.log.index(Step("fsync", here), committed)
    read_back = [at("read", folder + file) for file in files]
    assert committed < durable < min(read_back)
    assert not is_packed or max(read_back) < disk.log.index(Step("unlink", ready), handed_over)
    named = max(at("rename", f"{here}/.{name}.tmp", f"{here}/{name}") for name in ("tags.json", "latest"))
    removed = [number for number, step in enumerate(disk.log) if step.what in ("unlink", "rmdir") and old in step.path]
    assert max(read_back) < named < min(removed)


def test_the_files_of_every_rank_are_synced_and_read_back_before_the_manifest_is_written(tmp_path):
    disk = Disk(tmp_path)
    with disk:
        save_on_two_ranks(tmp_path, 1)
    here = "runs/run00000/artifacts/checkpoints"
    partial = f"{here}/.E0_U2_S4.tmp"
    [temporary] = {step.path for step in disk.log if step.what == "rename" and step.target == partial}

    def at(*step: str, after: int = 0) -> int:
        return disk.log.index(Step(*step), after)

    sealed, renamed = at("open", f"{temporary}/manifest.json"), at("rename", temporary, partial)
    for name in ("rank-0.safetensors", "rank-0.json", "rank-1.safetensors", "rank-1.json"):
        file = f"{temporary}/{name}"
        synced = at("fsync", file)
        assert at("open", file) < synced < at("read", file, after=synced) < sealed
    assert sealed < renamed < at("rename", partial, f"{here}/.E0_U2_S4.ready")


def test_a_checkpoint_that_reads_back_wrong_replaces_no_older_one(tmp_path):
    """A disk that loses a bit between the write and the first read of it."""

    def flip(step: Step) -> None:
        if step.target.endswith("/E0_U2_S4"):
            path = disk.folder / step.path / "model.safetensors"
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    disk = Disk(tmp_path, flip)
    with disk:
        save_checkpoint(tmp_path, 1)
        with pytest.raises(CheckpointError, match=r"read back, .*model\.safetensors"):
            save_checkpoint(tmp_path, 2)
    assert names(PathProvider(tmp_path, RUN)) == ["E0_U1_S2"]


def replace_without_sync(path: Path, text: str) -> None:
    path.with_name("new").write_text(text)
    path.with_name("new").replace(path)
    sync(path, path.parent)


def replace_and_forget(path: Path, text: str) -> None:
    path.with_name("new").write_text(text)
    sync(path.with_name("new"))
    path.with_name("new").replace(path)


def write_in_place(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path, path.parent)


@pytest.mark.parametrize(
    ("write", "during", "afterwards"),
    [
        (write_text, {"old text", "new text"}, {"new text"}),
        (replace_without_sync, {"old text", "new text", "", "new "}, {"new text"}),
        (replace_and_forget, {"old text", "new text"}, {"old text", "new text"}),
        (write_in_place, {"old text", "new ", "new text"}, {"new text"}),
    ],
)
def test_the_simulated_disk_loses_what_was_not_synced(tmp_path, write, during, afterwards):
    def texts(disk: Disk) -> set[str]:
        return {tree["text"].decode() for tree in disk.after_all_cuts().values()}

    seen: set[str] = set()
    disk = Disk(tmp_path, lambda step: seen.update(texts(disk)))
    (tmp_path / "text").write_text("old text")
    with disk:
        write(tmp_path / "text", "new text")
        assert texts(disk) == afterwards
        assert disk.unsynced() == ([] if afterwards == {"new text"} else ["text"])
    assert seen | afterwards == during


class Metrics(CallbackBase):
    """Logs at every update, sends that at some, and asks for a tagged checkpoint at others."""

    def __init__(self, send: Callable[[], object], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.total = torch.zeros(())
        self.send = send

    def _track_after_accumulation_step(self, update_counter, batch, losses, outputs):
        self.total = self.total + losses["total"]

    def _after_update(self, update_counter):
        self.writer.add_scalar("total", self.total)
        if update_counter.update in (3, 5):
            self.checkpoint_writer.request("odd")

    def _after_log(self, update_counter, metrics):
        if update_counter.update in (1, 6):
            self.send()

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state_dict):
        self.total = state_dict["total"]


class Received(NoopTracker):
    """Collects the points it receives, like another machine that a power cut here does not affect."""

    def __init__(self, points: Sequence[Point]) -> None:
        super().__init__()
        self.points = list(points)

    def log_points(self, points: Sequence[Point]) -> None:
        self.points += points


def train_to_the_end(maker, folder: Path, received: Received) -> dict[str, object]:
    """Start a run, or resume it from what is there; return its final result."""
    maker.folder = folder
    paths = maker.paths()
    callbacks = {"metrics": (Metrics, {"send": lambda: shipment.send()})}
    sync_journal = JournalReader(paths.journal).sync
    Committer(paths, sync_journal=sync_journal).recover()
    is_resumed = bool(names(paths))
    hand_over = InPlace(Committer(paths, sync_journal=sync_journal, on_committed=lambda: shipment.send()))
    options = {"every_n_updates": 2, "hand_over": hand_over}
    run = maker.run(callbacks, checkpoint=options, resume=is_resumed, max_updates=7)
    if is_resumed:
        newest = read_newest(paths)
        run.checkpoint_writer.restore_tags(str(newest.progress), newest.tags)
    journal = run.log_writer._journal
    shipment = Shipment(journal, paths.journal_sent, received)
    train(run)
    shipment.send()
    maker.close()
    maker.runs.clear()
    points = [point for line, _ in journal.read() for point in line]
    journal.close()
    assert set(points) == set(received.points), "a point is missing, or was sent with another time"
    tags = {tag: name.split("_")[1] for tag, name in read_tags(paths).items()}
    kept = {name: checkpoint_bytes(paths.run_dir) for name in names(paths)}
    return {"points": [(point.key, point.step, point.value) for point in points], "tags": tags, "kept": kept}


@pytest.mark.slow
def test_a_run_resumes_exactly_from_what_a_power_cut_leaves_at_any_operation(maker, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_QUICK_S", math.inf)  # one thread: the same operations in the same order
    received, cuts, found = Received([]), Cuts(), []

    def cut(step: Step) -> None:
        found.extend((*left, list(received.points)) for left in cuts.take(disk, step))

    disk = Disk(tmp_path / "disk", cut)
    disk.folder.mkdir()
    with disk:
        expected = train_to_the_end(maker, disk.folder, received)
    assert len(found) > 100
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no more cuts
    monkeypatch.setattr(lock_file, "kernel", lambda: "the one after the power cut")
    for name, tree, points in found:
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        write_tree(tree, tmp_path / "cut")
        assert train_to_the_end(maker, tmp_path / "cut", Received(points)) == expected, name
