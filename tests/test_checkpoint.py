import math
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from ksuit_runner import checkpoint
from ksuit_runner.checkpoint import CheckpointWriter, read_tags
from ksuit_runner.checkpoint_format import damage, names, read_newest
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import CheckpointError, ConfigError
from ksuit_runner.paths import PathProvider


class Saves:
    """A writer that is asked to save after every update at which something is due."""

    def __init__(self, folder, **options):
        self.paths = PathProvider(folder, "run00000")
        self.counter = UpdateCounter(6, 2, max_epochs=100)
        self.writer = CheckpointWriter(self.paths, **options)

    def save(self, wait=False, before=lambda: None):
        state = {"trainer": {"update": self.counter.update}, "callbacks": {}}
        self.writer.save(self.counter, {"w": torch.full((4,), float(self.counter.update))}, state, before, wait)

    def go_on(self, updates, tags=None):
        """Do updates; ``tags`` are what a callback asks for after an update."""
        for _ in range(updates):
            self.counter.update += 1
            for tag in (tags or {}).get(self.counter.update, ()):
                self.writer.request(tag)
            if self.writer.is_due(self.counter):
                self.save()
        self.writer.wait(is_last=True)

    def kept(self):
        return [name.split("_")[1] for name in reversed(names(self.paths))]


@pytest.fixture
def saves(tmp_path):
    made = []

    def make(**options):
        made.append(Saves(tmp_path, **options))
        return made[-1]

    yield make
    for item in made:
        item.writer.close()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"every_n_updates": 2, "keep_last": 1}, ["U12"]),
        ({"every_n_updates": 2, "keep_last": 3}, ["U8", "U10", "U12"]),
        ({"every_n_epochs": 1}, ["U9", "U12"]),
        ({"every_n_samples": 5, "keep_last": 99}, ["U3", "U5", "U8", "U10"]),
        ({"every_n_updates": 1, "keep_last": 2, "keep_every": 5}, ["U5", "U10", "U11", "U12"]),
        ({}, []),
    ],
)
def test_what_is_kept(saves, options, kept):
    item = saves(**options)
    item.go_on(12)
    assert item.kept() == kept
    assert all(damage(item.paths.checkpoints_dir / name) is None for name in names(item.paths))


def test_a_tagged_checkpoint_is_kept_until_the_tag_moves_on(saves):
    item = saves(every_n_updates=2, keep_last=1)
    item.go_on(6, tags={3: ["best"]})
    assert item.kept() == ["U3", "U6"]
    assert read_tags(item.paths) == {"best": "E1_U3_S6"}
    item.go_on(2, tags={7: ["best", "other"]})
    assert item.kept() == ["U7", "U8"]
    assert set(read_tags(item.paths).values()) == {"E2_U7_S14"}


def test_a_kill_between_the_commit_and_the_tags_is_made_good(saves):
    item = saves(every_n_updates=1)
    item.go_on(3, tags={2: ["old"], 3: ["best"]})
    item.paths.tags.write_text('{"old": "E0_U2_S4"}')
    found = read_newest(item.paths)
    item.writer.take_up(str(found.progress), found.tags)
    assert read_tags(item.paths) == {"old": "E0_U2_S4", "best": "E1_U3_S6"}
    before = item.paths.tags.stat()
    item.writer.take_up(str(found.progress), found.tags)
    assert item.paths.tags.stat().st_ino == before.st_ino  # nothing to write


def test_a_request_holds_for_one_update(saves):
    item = saves()
    item.go_on(4, tags={2: ["best"]})
    assert item.kept() == ["U2"]


def test_latest_names_the_newest(saves):
    item = saves(every_n_updates=1)
    item.go_on(5)
    assert item.paths.latest.read_text() == "E1_U5_S10\n"
    assert read_newest(item.paths).model["w"].tolist() == [5.0] * 4


def test_training_may_change_the_weights_while_they_are_written(saves):
    item, weights = saves(), torch.zeros(300_000)
    item.writer.save(item.counter, {"w": weights}, {"trainer": {}, "callbacks": {}})
    weights.fill_(1)
    item.writer.wait(is_last=True)
    assert not read_newest(item.paths).model["w"].any()


def test_a_tiny_state_is_on_the_disk_at_once(saves, monkeypatch):
    monkeypatch.setattr(checkpoint, "_QUICK_S", math.inf)
    item = saves()
    for update in range(1, 5):
        item.counter.update = update
        item.save()
        assert item.kept()[-1] == f"U{update}"


def test_a_disk_that_is_slow_makes_training_wait_twice_and_no_more(saves, monkeypatch):
    monkeypatch.setattr(checkpoint, "_QUICK_S", 0)
    item, gate = saves(), threading.Event()
    for update in range(1, 4):
        item.counter.update = update
        item.save(before=gate.wait if update == 3 else lambda: None)
    assert item.kept() == ["U1", "U2"]
    gate.set()


def test_small_states_queue_up_while_training_goes_on(saves, monkeypatch):
    monkeypatch.setattr(checkpoint, "TINY", 0)
    item, gate = saves(keep_last=9), threading.Event()
    for update in range(1, 5):
        item.counter.update = update
        item.save(before=gate.wait)
    assert item.kept() == []
    gate.set()
    item.writer.wait(is_last=True)
    assert item.kept() == ["U1", "U2", "U3", "U4"]
    found = [read_newest(item.paths, name).model["w"][0].item() for name in reversed(names(item.paths))]
    assert found == [1, 2, 3, 4]


def test_a_large_state_waits_for_the_one_before(saves, monkeypatch):
    monkeypatch.setattr(checkpoint, "TINY", 0)
    monkeypatch.setattr(checkpoint, "_SMALL", 0)
    item, gate = saves(keep_last=9), threading.Event()
    item.save(before=gate.wait)
    second = threading.Thread(target=item.save)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join(60)
    assert not second.is_alive()


def test_tensors_of_callbacks_get_files_of_their_own(saves, bits):
    item, average = saves(), torch.zeros(3)
    item.writer.add_tensors("ema", lambda: {"w": average})
    average.fill_(2)
    item.save(wait=True)
    folder = read_newest(item.paths).paths.checkpoint_dir
    assert bits(load_file(folder / "ema.safetensors")) == bits({"w": torch.full((3,), 2.0)})
    assert list(load_file(folder / "model.safetensors")) == ["w"]


@pytest.mark.parametrize("name", ["ema", "model"])
def test_a_file_has_one_owner(saves, name):
    item = saves()
    item.writer.add_tensors("ema", dict)
    with pytest.raises(ConfigError, match=f"'{name}.safetensors'"):
        item.writer.add_tensors(name, dict)


def test_tied_weights_are_written(saves):
    item, weight = saves(), torch.arange(4.0)
    item.writer.save(item.counter, {"a": weight, "b": weight}, {"trainer": {}, "callbacks": {}}, wait=True)
    assert read_newest(item.paths).model["b"].tolist() == [0, 1, 2, 3]


def test_weights_alone_can_be_saved_and_read(saves):
    saver = saves(every_n_updates=1)
    saver.writer.save(saver.counter, {"w": torch.ones(2)}, {}, wait=True)
    found = read_newest(saver.paths)
    assert torch.equal(found.model["w"], torch.ones(2))
    assert (found.state["trainer"], found.state["callbacks"]) == ({}, {})


def test_a_position_that_was_found_damaged_is_written_again(saves):
    item = saves(every_n_updates=1, keep_last=2)
    item.go_on(3)
    (item.paths.checkpoints_dir / "E1_U3_S6" / "model.safetensors").write_bytes(b"")
    item.counter.update = 2
    item.go_on(1)
    assert str(read_newest(item.paths).progress) == "E1_U3_S6"
    assert item.kept() == ["U2", "U3"]


def test_a_later_damaged_checkpoint_does_not_push_out_a_good_one(saves):
    item = saves(every_n_updates=1, keep_last=2)
    item.go_on(3)
    for name in ("E1_U3_S6", "E0_U2_S4"):
        (item.paths.checkpoints_dir / name / "trainer.pt").unlink()
    item.counter.update = 1
    item.go_on(1)
    assert str(read_newest(item.paths).progress) == "E0_U2_S4"


@pytest.mark.parametrize("option", [{"keep_last": 0}, {"keep_every": 0}, {"every_n_updates": 0}])
def test_numbers_are_positive(tmp_path, option):
    with pytest.raises(ConfigError, match=f"{next(iter(option))}.* 0"):
        CheckpointWriter(PathProvider(tmp_path, "run00000"), **option)


# Run in a process of its own: the limit on the size of files stands for a full disk, and is real.
FULL_DISK = """
import logging, resource, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import Maker

logging.basicConfig(level="ERROR", format="%(levelname)s %(message)s", stream=sys.stdout)
from ksuit_runner.loop import train
from ksuit_runner.callback_base import CallbackBase

class Disk(CallbackBase):
    def _before_every_update(self, update_counter):
        self.checkpoint_writer.wait()
        full = {full}.get(update_counter.update)
        if full is not None:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (full, hard))

maker = Maker(Path({folder!r}))
model = torch.nn.Sequential(torch.nn.Linear(4, 5000), torch.nn.Linear(5000, 3))
run = maker.run({{"disk": (Disk, {{}})}}, checkpoint={{"every_n_updates": 2, "keep_last": 9}}, model=model)
try:
    train(run)
finally:
    print("reached", run.counter.update)
    maker.close()
"""


def on_a_full_disk(folder, full):
    """Train for 8 updates with a checkpoint after every second one, with ``full`` as {update: largest file}."""
    script = FULL_DISK.format(tests=str(__file__).rpartition("/")[0], folder=str(folder), full=full)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("largest", [20_000, 300_000], ids=["weights do not fit", "optimizer state does not fit"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, largest):
    done = on_a_full_disk(tmp_path, {2: largest, 4: -1})
    paths = PathProvider(tmp_path, "run00000")
    assert done.returncode == 0, done.stderr
    assert "reached 8" in done.stdout
    assert done.stdout.count("ERROR") == 1 and "tries again at the next interval" in done.stdout
    assert sorted(path.name for path in paths.checkpoints_dir.iterdir()) == [
        "E0_U2_S12", "E2_U6_S36", "E2_U8_S48", "latest", "tags.json",
    ]  # fmt: skip
    assert read_newest(paths).progress.update == 8


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path):
    done = on_a_full_disk(tmp_path, {6: 300_000})
    paths = PathProvider(tmp_path, "run00000")
    assert done.returncode != 0
    assert f"{CheckpointError.__name__}: the checkpoint could not be written to {paths.checkpoints_dir}" in done.stderr
    assert "reached 8" in done.stdout
    assert read_newest(paths).progress.update == 6
    assert not [path.name for path in paths.checkpoints_dir.iterdir() if path.name.startswith(".")]
