"""Checkpoints are committed by a process without torch, whatever became of the one that has written them."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial

import pytest
import torch
from stored_checkpoint import hand_over_checkpoint, store_checkpoint

from ksuit_runner.checkpoint import commit as commit_module
from ksuit_runner.checkpoint import format as checkpoint_format
from ksuit_runner.checkpoint.commit import Committer
from ksuit_runner.checkpoint.folders import damage, names, needs_recovery, newest_tags, read_tags
from ksuit_runner.checkpoint.format import MODEL, STATE, pack_state, read_newest
from ksuit_runner.checkpoint.manifest import MANIFEST, fingerprint, manifest_text
from ksuit_runner.errors import TakenOverError
from ksuit_runner.paths import PathProvider
from ksuit_runner.system import lock_file


@pytest.fixture
def paths(tmp_path):
    return PathProvider(tmp_path, "run00000")


def content(value=1.0, **state):
    files = {"model": {"w": torch.full((3,), value)}, "ema": {"w": torch.zeros(2)}}
    return pack_state(files, {"callbacks": {"a": {"best": value}}, **state})


def ready(paths, name, value=1.0, config_hash="hash", keep_last=99, tags=(), is_packed=False, **state):
    hand_over_checkpoint(paths, name, content(value, **state), config_hash, keep_last, tags, is_packed)
    return paths.checkpoints_dir / f".{name}.ready"


def value(paths):
    return read_newest(paths).state["callbacks"]["a"]["best"]


def left(paths):
    return sorted(path.name for path in paths.checkpoints_dir.iterdir())


def cut(path):
    os.truncate(path, path.stat().st_size * 9 // 10)


def test_what_commits_imports_no_torch(paths, tmp_path):
    ready(paths, "E0_U1_S1", tags=["best"], is_packed=True)
    script = f"""
import sys
from ksuit_runner.checkpoint.commit import Committer
from ksuit_runner.paths import PathProvider
Committer(PathProvider({str(tmp_path)!r}, "run00000")).recover()
print(*sorted(sys.modules.keys() & {{"torch", "mlflow"}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [] and done.stderr == ""
    assert left(paths) == ["E0_U1_S1", "latest", "tags.json"] and value(paths) == 1.0


def test_what_is_handed_over_is_no_checkpoint_yet(paths):
    ready(paths, "E0_U1_S1")
    assert names(paths) == [] and left(paths) == [".E0_U1_S1.ready"]
    Committer(paths).commit("E0_U1_S1")
    assert left(paths) == ["E0_U1_S1", "latest", "tags.json"]


def commit(paths, update):
    name = f"E0_U{update}_S{update}"
    ready(paths, name, keep_last=1)
    Committer(paths).commit(name)
    return names(paths)


def test_a_checkpoint_that_another_process_reads_is_removed_once_that_has_read_it(paths, tmp_path):
    commit(paths, 1)
    script = f"""
import os
import signal
import sys
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.paths import PathProvider
found = read_newest(PathProvider({str(tmp_path)!r}, "run00000"), holds=True)
if os.fork() == 0:  # as the workers of a fork, which outlive the reading
    signal.pause()
print("read", flush=True)
sys.stdin.readline()
found.hold.release()
print("released", flush=True)
sys.stdin.read()
"""
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == "read\n"
            assert commit(paths, 2) == ["E0_U2_S2", "E0_U1_S1"]
            assert commit(paths, 3) == ["E0_U3_S3", "E0_U1_S1"]
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "released\n"
            assert commit(paths, 4) == ["E0_U4_S4"]
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_checkpoint_is_held_as_long_as_what_was_read_of_it_is_in_use(paths):
    commit(paths, 1)
    found = read_newest(paths, holds=True)
    assert len(commit(paths, 2)) == 2
    del found
    assert commit(paths, 3) == ["E0_U3_S3"]


def test_metrics_are_durable_before_the_checkpoint(paths):
    found = []
    ready(paths, "E0_U1_S1")
    Committer(
        paths, sync_journal=lambda: found.append(names(paths)), on_committed=lambda: found.append(names(paths))
    ).commit("E0_U1_S1")
    assert found == [[], ["E0_U1_S1"]]


def test_a_checkpoint_whose_metrics_cannot_be_made_durable_is_dropped(paths):
    def fail():
        raise OSError(5, "Input/output error")

    ready(paths, "E0_U1_S1")
    with pytest.raises(OSError, match="Input/output error"):
        Committer(paths, sync_journal=fail).commit("E0_U1_S1")
    assert left(paths) == []


@pytest.mark.parametrize("name", [MODEL, STATE, MANIFEST])
@pytest.mark.parametrize("change", [cut, os.unlink], ids=["cut", "missing"])
def test_what_is_not_whole_is_dropped_and_replaces_nothing(paths, caplog, name, change):
    store_checkpoint(paths, "E0_U1_S1", content(), keep_last=1)
    change(ready(paths, "E0_U1_S1", 2.0, config_hash="other") / name)
    with pytest.raises(OSError, match=f"what was written is damaged, {name}"):
        Committer(paths).commit("E0_U1_S1")
    assert left(paths) == ["E0_U1_S1", "latest", "tags.json"] and value(paths) == 1.0
    change(ready(paths, "E0_U2_S2", 2.0, keep_last=1) / name)
    Committer(paths).recover()
    (record,) = caplog.records
    assert "E0_U2_S2 of a process that died is dropped" in record.message and name in record.message
    assert left(paths) == ["E0_U1_S1", "latest", "tags.json"]


@pytest.mark.parametrize("file", ["ema.safetensors", STATE])
def test_a_file_that_cannot_be_opened_is_found_when_it_is_read_back(paths, file):
    store_checkpoint(paths, "E0_U1_S1", content())
    folder = ready(paths, "E0_U1_S1", 2.0, config_hash="other")
    (folder / file).write_text("something else")
    (folder / MANIFEST).unlink()
    files = {path.name: fingerprint(path) for path in folder.iterdir()}
    (folder / MANIFEST).write_text(manifest_text(files, "E0_U1_S1", "other", False, {}, keep_last=1))
    with pytest.raises(OSError, match=f"read back, {file} cannot be read"):
        Committer(paths).commit("E0_U1_S1")
    assert left(paths) == ["E0_U1_S1", "latest", "tags.json"] and value(paths) == 1.0


@pytest.mark.parametrize(
    ("options", "stays"),
    [({}, True), ({"config_hash": "other"}, False), ({"unfinished": {"phase": "x"}}, False)],
    ids=["the same", "another config", "half done"],
)
def test_an_intact_checkpoint_of_the_same_stays_and_another_is_replaced(paths, options, stays):
    store_checkpoint(paths, "E0_U1_S1", content(), tags=["old"])
    ready(paths, "E0_U1_S1", 2.0, tags=["new"], **options)
    Committer(paths).commit("E0_U1_S1")
    assert left(paths) == ["E0_U1_S1", "latest", "tags.json"]
    assert value(paths) == (1.0 if stays else 2.0)
    assert read_tags(paths) == {"old": "E0_U1_S1", "new": "E0_U1_S1"}


def test_a_damaged_checkpoint_and_leftovers_are_replaced(paths):
    folder = store_checkpoint(paths, "E0_U1_S1", content())
    cut(folder / MODEL)
    for suffix in ("tmp", "ready", "unpacked"):
        folder.with_name(f".E0_U1_S1.{suffix}").mkdir()
        (folder.with_name(f".E0_U1_S1.{suffix}") / "left_over").write_text("of a process that was killed")
    store_checkpoint(paths, "E0_U1_S1", content(2.0))
    assert value(paths) == 2.0 and not (folder / "left_over").exists()
    assert left(paths) == ["E0_U1_S1", "latest", "tags.json"]


@pytest.mark.parametrize("new", ["whole", "damaged", "missing"])
def test_a_checkpoint_that_a_killed_process_was_replacing_is_recovered(paths, new):
    folder = store_checkpoint(paths, "E0_U1_S1", content())
    replaced = folder.with_name(".E0_U1_S1.old")
    (os.rename if new == "missing" else shutil.copytree)(folder, replaced)
    if new == "damaged":
        cut(folder / MODEL)
    before = sorted(paths.checkpoints_dir.rglob("*"))
    assert needs_recovery(paths) is (new == "missing") and names(paths) == ["E0_U1_S1"] * (new != "missing")
    assert sorted(paths.checkpoints_dir.rglob("*")) == before, "looking changes nothing"
    Committer(paths).recover()
    assert names(paths) == ["E0_U1_S1"] and damage(folder) is None and not replaced.exists()
    (shutil.copytree if new == "whole" else os.rename)(folder, replaced)
    store_checkpoint(paths, "E0_U1_S1", content(2.0), config_hash="other")
    assert left(paths) == ["E0_U1_S1", "latest", "tags.json"] and value(paths) == 2.0


def test_a_successor_that_cannot_be_read_stays_if_what_it_has_replaced_cannot_be_read_either(paths, monkeypatch):
    folder = store_checkpoint(paths, "E0_U1_S1", content())
    shutil.copytree(folder, folder.with_name(".E0_U1_S1.old"))
    cut(folder.with_name(".E0_U1_S1.old") / MODEL)
    with monkeypatch.context() as patch:
        patch.setattr(commit_module, "damage", lambda *args, **kwargs: "too many open files")
        Committer(paths).recover()
    assert left(paths) == ["E0_U1_S1", "latest", "tags.json"] and value(paths) == 1.0


@pytest.mark.parametrize("step", ["sync", "_read_back"])
def test_a_replacement_that_fails_leaves_the_checkpoint_as_it_was(paths, monkeypatch, step):
    store_checkpoint(paths, "E0_U1_S1", content())

    def fail(*args):
        raise OSError(28, "no room")

    monkeypatch.setattr(commit_module, step, fail)
    ready(paths, "E0_U1_S1", 2.0, config_hash="other")
    with pytest.raises(OSError, match="no room"):
        Committer(paths).commit("E0_U1_S1")
    assert left(paths) == ["E0_U1_S1", "latest", "tags.json"] and value(paths) == 1.0


def test_of_many_that_wait_those_with_tags_come_first_and_then_the_newest(paths):
    committer, found, latest = Committer(paths), [], []

    def note(name, error):
        found.append((name[4], len(list(paths.checkpoints_dir.glob(".*.ready")))))
        latest.append(paths.latest.read_text().strip() if paths.latest.exists() else None)

    for update, tags in enumerate([[], ["best"], [], ["best"], [], [], []], start=1):
        ready(paths, f"E0_U{update}_S{update}", update, keep_last=2, tags=tags, is_packed=update % 2 == 0)
    cut(ready(paths, "E0_U8_S8", keep_last=2) / MODEL)
    assert needs_recovery(paths)
    errors = committer.commit_waiting(note)
    assert [name for name, error in errors.items() if error] == ["E0_U8_S8"] and len(errors) == 8
    assert "".join(update for update, _ in found) == "24876531"
    assert found[-1][1] == 3, "what is superseded is removed when everyone is told"
    assert latest == ["E0_U2_S2", *2 * ["E0_U4_S4"], *5 * ["E0_U7_S7"]]
    assert names(paths) == ["E0_U7_S7", "E0_U6_S6", "E0_U4_S4"] and left(paths)[3:] == ["latest", "tags.json"]
    assert read_tags(paths) == {"best": "E0_U4_S4"} and committer.commit_waiting() == {}


@pytest.mark.parametrize("failing", [[5], [5, 4], [5, 4, 3, 2, 1], [4]])
@pytest.mark.parametrize("is_packed", [True, False])
def test_no_older_one_is_dropped_for_a_newer_one_that_the_disk_does_not_take(paths, monkeypatch, failing, is_packed):
    def sync(*given, sync=commit_module.sync):
        if {f"U{update}" for update in failing} & {part for path in given for part in path.name.split("_")}:
            raise OSError(errno.EIO, "Input/output error")
        sync(*given)

    for update in range(1, 6):
        ready(paths, f"E0_U{update}_S{update}", update, keep_last=2, is_packed=is_packed)
    monkeypatch.setattr(commit_module, "sync", sync)
    errors = Committer(paths).commit_waiting()
    assert [int(name[4]) for name, error in errors.items() if error] == failing and len(errors) == 5
    assert not any(isinstance(error, Exception) and error.errno != errno.EIO for error in errors.values())
    kept = [f"E0_U{update}_S{update}" for update in (5, 4, 3, 2, 1) if update not in failing][:2]
    assert names(paths) == kept and not list(paths.checkpoints_dir.glob(".*"))
    assert not kept or paths.latest.read_text() == f"{kept[0]}\n"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("tags", [[], ["best"]])
@pytest.mark.parametrize("is_packed", [True, False])
def test_whatever_a_kill_leaves_of_many_that_wait_the_next_process_commits(paths, monkeypatch, is_packed, tags):
    steps = ("write_text", "_drop", "sync", "_read_back", "unpack")

    def attempt(folder, kill_at):  # before the call of that number which changes the folder
        given, left_over = PathProvider(folder, "run00000"), [kill_at]
        for update in range(1, 6):
            made = tags if update in (2, 4) else []
            ready(given, f"E0_U{update}_S{update}", update, keep_last=2, tags=made, is_packed=is_packed)

        def counted(call, *args):
            left_over[0] -= 1
            if left_over[0] < 0:
                raise Killed
            return call(*args)

        with monkeypatch.context() as patch:
            for step in steps:
                patch.setattr(commit_module, step, partial(counted, getattr(commit_module, step)))
            with suppress(Killed):
                Committer(given).commit_waiting()
        Committer(given).recover()
        assert given.latest.read_text() == "E0_U5_S5\n"
        assert read_tags(given) == newest_tags(given) == {tag: "E0_U4_S4" for tag in tags}
        *removed_later, fourth, fifth, _, _ = left(given)  # by the next commit
        assert [fourth, fifth] == ["E0_U4_S4", "E0_U5_S5"] and removed_later in ([], ["E0_U2_S2"][: len(tags)])
        return left_over[0] < 0

    kills = 0
    while attempt(paths.output_dir / str(kills), kills):
        kills += 1
    assert kills > 10


@pytest.mark.parametrize("has_room", [True, False])
def test_what_is_superseded_makes_room_on_a_full_disk(paths, monkeypatch, has_room):
    def sync(*given, sync=commit_module.sync):
        if len(list(paths.checkpoints_dir.glob(".*.ready"))) > (2 if has_room else 0):
            raise OSError(errno.ENOSPC, "no room")
        sync(*given)

    for update in range(1, 6):
        ready(paths, f"E0_U{update}_S{update}", update, keep_last=2, is_packed=True)
    monkeypatch.setattr(commit_module, "sync", sync)
    errors = [*Committer(paths).commit_waiting().values()]
    assert [str(error) for error in errors] == 2 * ["None" if has_room else "[Errno 28] no room"] + 3 * ["None"]
    assert left(paths) == (["E0_U4_S4", "E0_U5_S5", "latest", "tags.json"] if has_room else [])


def test_no_more_is_dropped_for_room_than_is_needed(paths, monkeypatch):
    def sync(*given, sync=commit_module.sync):
        if len(list(paths.checkpoints_dir.glob(".*.ready"))) > 4:
            raise OSError(errno.ENOSPC, "no room")
        if {"U5", "U4"} & {part for path in given for part in path.name.split("_")}:
            raise OSError(errno.EIO, "Input/output error")
        sync(*given)

    for update in range(1, 6):
        ready(paths, f"E0_U{update}_S{update}", update, keep_last=2, is_packed=True)
    monkeypatch.setattr(commit_module, "sync", sync)
    Committer(paths).commit_waiting()
    assert left(paths) == ["E0_U2_S2", "E0_U3_S3", "latest", "tags.json"]


def test_a_disk_that_is_full_when_a_folder_has_its_name_already_is_said_to_be_full(paths, monkeypatch):
    def sync(*given, sync=commit_module.sync):
        if given == (paths.checkpoints_dir,):
            raise OSError(errno.ENOSPC, "no room")
        sync(*given)

    for update in (1, 2):
        ready(paths, f"E0_U{update}_S{update}", update, keep_last=1)
    monkeypatch.setattr(commit_module, "sync", sync)
    assert [str(error) for error in Committer(paths).commit_waiting().values()] == 2 * ["[Errno 28] no room"]


@pytest.mark.parametrize("file", [MODEL, "rank-1.safetensors"])
def test_a_newer_one_that_is_damaged_supersedes_none(paths, file):
    tensors = {"w": torch.ones(3)}
    store_checkpoint(paths, "E0_U9_S9", pack_state({"model": tensors, "rank-1": tensors}, {}), keep_last=1)
    with open(paths.checkpoints_dir / "E0_U9_S9" / file, "r+b") as damaged:
        damaged.seek(-1, os.SEEK_END)
        damaged.write(b"x")
    ready(paths, "E0_U2_S2", 2.0, keep_last=1, is_packed=True)
    Committer(paths).recover()
    assert paths.latest.read_text() == "E0_U2_S2\n"


def test_a_damaged_newer_one_is_not_among_those_that_are_kept(paths):
    for update in (1, 9):
        ready(paths, f"E0_U{update}_S{update}", keep_last=2)
        Committer(paths).commit(f"E0_U{update}_S{update}")
    cut(paths.checkpoints_dir / "E0_U9_S9" / MODEL)
    ready(paths, "E0_U2_S2", keep_last=2)  # by a run that was resumed from the older one
    Committer(paths).commit("E0_U2_S2")
    assert names(paths) == ["E0_U9_S9", "E0_U2_S2", "E0_U1_S1"]


def test_one_with_tags_is_committed_however_many_are_newer(paths):
    for update in (5, 6):
        commit(paths, update)
    ready(paths, "E0_U2_S2", keep_last=1, tags=["best"])
    assert Committer(paths).commit_waiting() == {"E0_U2_S2": None}
    assert read_tags(paths) == {"best": "E0_U2_S2"} and paths.latest.read_text() == "E0_U6_S6\n"


def test_nothing_is_removed_of_a_run_that_is_taken_over_while_it_is_committed(paths):
    commit(paths, 1)
    ready(paths, "E0_U2_S2", keep_last=1)
    taken = []

    def check_owner():
        if taken:
            raise TakenOverError("another process has resumed it")

    Committer(paths, check_owner).commit_waiting(lambda name, error: taken.append(name))
    assert taken == names(paths)[:1] == ["E0_U2_S2"] and names(paths)[1:] == ["E0_U1_S1"]


@pytest.mark.parametrize("is_packed", [True, False])
def test_what_cannot_be_handed_over_takes_no_room(paths, monkeypatch, is_packed):
    def refuse(*paths):
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    with pytest.raises(OSError, match="no room"):
        ready(paths, "E0_U1_S1", is_packed=is_packed)
    assert left(paths) == []


def test_two_threads_that_commit_the_same_lose_none_of_it(paths):
    others = []

    def meanwhile():
        if not others:
            others.append(threading.Thread(target=committer.recover))
            others[0].start()
            others[0].join(0.2)

    committer = Committer(paths, sync_journal=meanwhile)
    for update in range(1, 6):
        ready(paths, f"E0_U{update}_S{update}", keep_last=1, tags=[f"update-{update}"], is_packed=True)
    errors = committer.commit_waiting()
    others[0].join()
    assert list(errors.values()) == 5 * [None]
    assert [f"update-{name[4]}" for name in reversed(names(paths))] == list(read_tags(paths))
    assert len(names(paths)) == 5 and not any(damage(paths.checkpoints_dir / name) for name in names(paths))


def test_as_many_are_kept_as_the_checkpoint_says(paths):
    for update, keep_last in ((1, 9), (2, 9), (3, 2), (4, 9), (5, 1)):
        ready(paths, f"E0_U{update}_S{update}", keep_last=keep_last, tags=["best"] if update == 2 else [])
        Committer(paths).commit(f"E0_U{update}_S{update}")
        assert len(names(paths)) == (1, 2, 2, 3, 2)[update - 1]
    assert names(paths) == ["E0_U5_S5", "E0_U2_S2"]


@pytest.mark.parametrize("checks", [0, 1])
def test_who_does_not_own_the_run_any_more_changes_nothing(paths, checks):
    store_checkpoint(paths, "E0_U1_S1", content(), keep_last=1)
    ready(paths, "E0_U2_S2", keep_last=1, tags=["best"])
    remaining = [None] * checks

    def check():
        if not remaining:
            raise TakenOverError("somebody else")
        remaining.pop()

    with pytest.raises(TakenOverError):
        Committer(paths, check).recover()
    assert left(paths) == sorted([("E0_U2_S2" if checks else ".E0_U2_S2.ready"), "E0_U1_S1", "latest", "tags.json"])
    assert paths.latest.read_text() == "E0_U1_S1\n" and read_tags(paths) == {}


def test_an_error_other_than_of_the_disk_is_raised_and_leaves_nothing(paths, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(checkpoint_format, "write_file", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        ready(paths, "E0_U1_S1")
    assert left(paths) == []


@pytest.mark.parametrize("is_packed", [False, True])
def test_what_was_handed_over_before_a_restart_of_the_machine_may_be_newer_than_the_journal(
    paths, monkeypatch, is_packed
):
    ready(paths, "E0_U1_S1")
    Committer(paths).commit("E0_U1_S1")
    ready(paths, "E0_U2_S2", 2.0, is_packed=is_packed)
    monkeypatch.setattr(lock_file, "kernel", lambda: "the next one")
    Committer(paths).recover()
    assert left(paths) == ["E0_U1_S1", "latest", "tags.json"], "what is committed stays"


def test_the_tags_of_a_run_are_known_from_its_checkpoints_as_well(paths):
    for name, tags in (("E0_U1_S1", ["best", "first"]), ("E0_U2_S2", ["best"]), ("E0_U3_S3", [])):
        ready(paths, name, tags=tags)
        Committer(paths).commit(name)
    assert newest_tags(paths) == read_tags(paths) == {"best": "E0_U2_S2", "first": "E0_U1_S1"}
    paths.tags.unlink()
    cut(paths.checkpoints_dir / "E0_U2_S2" / MANIFEST)
    assert newest_tags(paths) == {"best": "E0_U1_S1", "first": "E0_U1_S1"}


def test_a_tag_that_only_the_list_has_is_kept_and_an_older_list_does_not_count(paths):
    for name, tags in (("E0_U1_S1", ["best"]), ("E0_U2_S2", ["best"])):
        ready(paths, name, tags=tags)
        Committer(paths).commit(name)
    ready(paths, "E0_U2_S2", tags=["final"])  # the same once more: what is there is kept, and gets the tag
    Committer(paths).commit("E0_U2_S2")
    assert newest_tags(paths) == read_tags(paths) == {"best": "E0_U2_S2", "final": "E0_U2_S2"}
    paths.tags.write_text('{"best": "E0_U1_S1", "final": "E0_U2_S2"}')
    assert newest_tags(paths) == {"best": "E0_U2_S2", "final": "E0_U2_S2"}
