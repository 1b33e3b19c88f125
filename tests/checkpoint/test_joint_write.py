"""Checkpoints that several ranks write together, each of them a thread here; and how any number of ranks reads them."""

import errno
import json
import shutil
import threading
import time
from contextlib import suppress

import pytest
import torch
from pieces import blocks, piece, state_of
from safetensors.torch import save_file
from worlds import ThreadWorld, in_threads

from ksuit_runner.checkpoint import commit, joint_write, shards
from ksuit_runner.checkpoint import writer as writer_module
from ksuit_runner.checkpoint.folders import damage, names
from ksuit_runner.checkpoint.format import read_newest, read_weights
from ksuit_runner.checkpoint.joint_write import JointWrite
from ksuit_runner.checkpoint.manifest import MANIFEST, fingerprint, manifest_text
from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.distributed.pieces import Piece, StoredTensor
from ksuit_runner.errors import CheckpointError, PeerError
from ksuit_runner.paths import PathProvider

NAME = "E0_U1_S2"


@pytest.fixture
def paths(tmp_path):
    return PathProvider(tmp_path, "run00000")


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch):
    monkeypatch.setattr(joint_write, "_GRACE_S", 0.0)


def save(world, paths, update=1, content=state_of, wait=True, **options):
    """Save what ``content`` returns on a rank, and return what was wrong."""
    counter = UpdateCounter(6, 2, max_epochs=100)
    counter.update = update
    writer = CheckpointWriter(paths, world=world, **{"peer_timeout_s": 5.0, **options})
    model, ema, state, _ = content(world.rank, world.size)
    writer.add_tensors("ema", lambda: ema)
    try:
        writer.save(counter, model, state, wait=wait)
        writer.wait()
    except (CheckpointError, PeerError) as error:
        return error
    finally:
        with suppress(PeerError, CheckpointError):
            writer.close()
    return None


def saved(size, paths, **options):
    return in_threads(size, lambda world: save(world, paths, **options))


def left(paths):
    return sorted(path.name for path in paths.checkpoints_dir.iterdir())


@pytest.mark.parametrize("writers", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_what_any_number_has_written(paths, writers):
    assert saved(writers, paths) == [None] * writers
    *_, expected = state_of(0, 1)

    single = read_newest(paths)
    assert single.model.keys() == expected.keys()
    assert all(torch.equal(single.model[name], value) for name, value in expected.items())
    assert single.model["half"].dtype == torch.bfloat16
    kept = single.state["trainer"]["optimizer"]["uneven"]
    assert torch.equal(kept["exp_avg"], expected["uneven"] * 2) and kept["step"] == 5
    assert single.state["callbacks"] == {"a": {"n": 1}} and single.local == ()

    def read(world):
        found = read_newest(paths, world=world)
        ema = read_weights(found.paths.checkpoint_dir, "ema")["uneven"]
        for stored, tensor in [
            *((found.model[name], expected[name]) for name in ("uneven", "columns", "tiny", "half")),
            (found.state["trainer"]["optimizer"]["uneven"]["exp_avg"], expected["uneven"] * 2),
            (ema, expected["uneven"] / 2),
        ]:
            assert isinstance(stored, StoredTensor)
            for dim in (0, 1):
                own = piece(tensor, world.rank, world.size, dim)
                assert torch.equal(stored.read(own.offset, own.tensor.shape), own.tensor)

    for readers in (2, 3, 4):
        in_threads(readers, read)


def test_blocks_in_two_dimensions_and_copies_of_them(paths):
    matrix = torch.arange(35.0).view(7, 5)

    def content(rank, size):
        own = blocks(matrix, 2, 2, rank % 4)
        return {"w": Piece(own.tensor, own.offset, own.shape, is_copy=rank >= 4)}, {}, {}, None

    assert saved(8, paths, content=content) == [None] * 8
    assert torch.equal(read_newest(paths).model["w"], matrix)
    sizes = [(paths.checkpoints_dir / NAME / f"rank-{rank}.safetensors").stat().st_size for rank in range(8)]
    assert min(sizes[:4]) > max(sizes[4:]), "copies are stored once"


def test_what_all_ranks_have_is_written_by_one_and_byte_for_byte_as_by_one(paths, tmp_path):
    def content(rank, size):
        state = {"callbacks": {"a": {"seen": torch.arange(3)}}, "trainer": {"update": 1}}
        return {"w": torch.ones(3)}, {"w": torch.zeros(3)}, state, None

    assert saved(3, paths, content=content) == [None] * 3
    alone = PathProvider(tmp_path / "alone", "run00000")
    assert saved(1, alone, content=content) == [None]
    found, expected = (
        {path.name: path.read_bytes() for path in item.checkpoints_dir.glob("E*/*")} for item in (paths, alone)
    )
    assert found == expected and "rank-0.json" not in found


def test_states_that_differ_between_ranks_come_back_by_rank(paths):
    def content(rank, size):
        return {"w": torch.ones(1)}, {}, {"local": {"means": {"seen": torch.arange(rank), "sum": float(rank)}}}, None

    assert saved(3, paths, content=content) == [None] * 3
    for found in (read_newest(paths), *in_threads(2, lambda world: read_newest(paths, world=world))):
        assert [len(state["means"]["seen"]) for state in found.local] == [0, 1, 2]
        assert [state["means"]["sum"] for state in found.local] == [0.0, 1.0, 2.0]


def test_ranks_that_have_no_whole_together_are_found_before_the_first_update(paths):
    def check(world):
        own = piece(torch.ones(6, 2), world.rank, 3)  # as if there were a third rank
        writer = CheckpointWriter(paths, world=world)
        with pytest.raises(CheckpointError, match=r"model: the pieces of 'w' overlap, or do not cover the whole"):
            writer.check({"w": own}, {})
        writer.close()
        return own

    in_threads(2, check)
    content = lambda rank, size: ({"w": piece(torch.ones(6, 2), rank, 3)}, {}, {}, None)  # noqa: E731
    leading, following = saved(2, paths, content=content)
    assert "do not cover the whole" in str(leading) and isinstance(following, PeerError)
    assert left(paths) == []


# Faults


class Dies(Exception):
    """A rank is killed here."""


class Death:
    """Kills a rank at a call of a function: what it leaves is that of a kill, as nothing is cleaned up."""

    def __init__(self, rank):
        self.rank, self.worlds = rank, {}

    def at(self, patch, owner, name, counts=lambda *args: True):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            if counts(*args):
                self.worlds[self.rank].lose()
                raise Dies
            return real(*args, **kwargs)

        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(owner, name, call)


def writes(file):
    return lambda path, *_: path.name == file


@pytest.mark.parametrize(
    ("rank", "point"),
    [
        (0, (shards, "write_file", writes("rank-0.safetensors"))),
        (0, (shards, "write_file", writes("rank-0.json"))),
        (0, (joint_write.JointWrite, "_check")),
        (0, (writer_module, "write_head")),
        (0, (commit, "hand_over")),
        (1, (shards, "write_file", writes("rank-1.safetensors"))),
        (1, (shards, "write_file", writes("rank-1.json"))),
        (1, (joint_write.JointWrite, "_part")),
    ],
)
def test_a_rank_that_dies_at_any_step_leaves_no_checkpoint_and_the_next_one_is_whole(paths, monkeypatch, rank, point):
    death = Death(rank)

    def run(world):
        death.worlds[world.rank] = world
        try:
            return save(world, paths, update=2)
        except Dies as error:
            return error

    assert saved(2, paths, update=1) == [None, None]
    with monkeypatch.context() as patch:
        death.at(patch, *point)
        found = in_threads(2, run)
    assert isinstance(found[rank], Dies) and found[1 - rank] is not None
    assert names(paths) == [NAME], "half a checkpoint was committed"

    assert saved(2, paths, update=2) == [None, None]
    assert left(paths) == [NAME, "E0_U2_S4", "latest", "tags.json"]
    assert damage(paths.checkpoints_dir / "E0_U2_S4") is None


def test_a_rank_that_dies_after_its_note_is_not_needed_any_more(paths, monkeypatch):
    """Its files are on the disk by then; what it leaves counts, as that of a process that dies after a commit."""
    posted = ThreadWorld.post

    def die(world, key, value):
        posted(world, key, value)
        if key.endswith("written-1"):
            raise Dies

    monkeypatch.setattr(ThreadWorld, "post", die)

    def run(world):
        with suppress(Dies):
            return save(world, paths)
        return "died"

    assert in_threads(2, run) == [None, "died"]
    assert damage(paths.checkpoints_dir / NAME) is None


def test_a_failure_after_which_the_ranks_meet_again_costs_no_checkpoint_that_is_being_written(paths, monkeypatch):
    monkeypatch.setattr(joint_write, "_GRACE_S", 20.0)
    real, worlds = JointWrite._part, []

    def fail(self, folder, shard):
        shared = self._world.shared
        shared.lost.add(1)
        threading.Timer(0.3, shared.lost.clear).start()
        worlds.append(self._world)
        return real(self, folder, shard)

    post = ThreadWorld.post
    monkeypatch.setattr(JointWrite, "_part", fail)
    monkeypatch.setattr(ThreadWorld, "post", lambda world, *note: (time.sleep(0.5 * bool(worlds)), post(world, *note)))
    assert saved(2, paths) == [None, None] and worlds
    assert damage(paths.checkpoints_dir / NAME) is None


def full_for(monkeypatch, rank, failures):
    """Let the disk of a rank be full for so many attempts."""
    real, remaining = shards.write_file, [None] * failures

    def write(path, content):
        if path.name == f"rank-{rank}.json" and remaining:
            remaining.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(shards, "write_file", write)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_rank_costs_that_checkpoint_and_no_other(paths, monkeypatch, caplog, rank):
    full_for(monkeypatch, rank, 1)
    assert saved(2, paths, update=1, wait=False) == [None, None]
    assert left(paths) == []
    [message] = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert "No space left" in message and "tries again at the next interval" in message
    assert ("rank 1: " in message) == (rank == 1)
    assert saved(2, paths, update=2, wait=False) == [None, None]
    assert names(paths) == ["E0_U2_S4"]


def test_the_last_checkpoint_waits_for_room_on_all_ranks(paths, monkeypatch):
    monkeypatch.setattr(writer_module, "_ROOM_POLL_S", 0.01)
    full_for(monkeypatch, 1, 3)
    assert saved(2, paths) == [None, None]
    full_for(monkeypatch, 1, 1000)
    leading, following = saved(2, paths, update=2, room_timeout_s=0.05)
    assert isinstance(leading, CheckpointError) and isinstance(following, PeerError)
    assert "rank 1: [Errno 28] No space left" in str(leading) and "rank 1: [Errno 28] No space left" in str(following)
    assert left(paths) == [NAME, "latest", "tags.json"]


def test_a_rank_that_is_late_writes_into_no_checkpoint_but_its_own(paths, monkeypatch):
    """Rank 1 still writes its part of a checkpoint when the ranks have begun another one of the same name."""
    late, real = threading.Event(), JointWrite._part

    def wait(self, folder, shard):
        late.wait(20)
        return real(self, folder, shard)

    monkeypatch.setattr(JointWrite, "_part", wait)

    def run(world):
        counter = UpdateCounter(6, 2, max_epochs=100)
        counter.update = 1
        writer = CheckpointWriter(paths, world=world, peer_timeout_s=0.2 if world.rank == 0 else 20.0)
        for seed in (1, 2):
            model, _, state, _ = state_of(world.rank, world.size, seed)
            writer.save(counter, model, state)
            if world.rank == 0:
                writer.wait()
            world.gather(None)
            late.set()
        writer.close()

    in_threads(2, run)
    *_, expected = state_of(0, 1, seed=2)
    assert torch.equal(read_newest(paths).model["uneven"], expected["uneven"])
    assert [path.name for path in paths.checkpoints_dir.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_is_shorter_than_its_rank_says_costs_that_checkpoint(paths, monkeypatch):
    written_by = JointWrite._written_by

    def cut(self, rank, deadline):
        files = written_by(self, rank, deadline)
        for name in files:
            (file,) = paths.checkpoints_dir.glob(f".*/{name}")
            file.write_bytes(file.read_bytes()[:-1])
        return files

    monkeypatch.setattr(JointWrite, "_written_by", cut)
    assert "is not as large here as its rank has written it" in str(saved(2, paths)[0])
    assert left(paths) == []


def test_ranks_without_a_common_folder_are_told_so(paths, tmp_path):
    elsewhere = PathProvider(tmp_path / "elsewhere", "run00000")
    leading, _ = in_threads(2, lambda world: save(world, paths if world.rank == 0 else elsewhere))
    assert "rank 1: [Errno 2] No such file or directory" in str(leading) and str(elsewhere.output_dir) in str(leading)


# Reading what is damaged or hostile


def forge(folder, change, rank=1):
    """Change the JSON of a rank, or its bytes, as somebody does who can write a right manifest as well."""
    path = folder / f"rank-{rank}.json"
    index = json.loads(path.read_text())
    changed = change(index)
    path.write_text(changed if isinstance(changed, str) else json.dumps(index))
    sign(folder)


def sign(folder):
    files = {path.name: fingerprint(path) for path in folder.iterdir() if path.name != MANIFEST}
    (folder / MANIFEST).write_text(manifest_text(files, folder.name, "hash", False, {}, keep_last=2))


def entry(index, file="model", name="uneven"):
    return index["pieces"][file][name]


FORGERIES = {
    "a gap": (lambda i: entry(i).update(offset=[5, 0]), "leave the whole|overlap"),
    "an overlap": (lambda i: entry(i).update(offset=[0, 0]), "overlap"),
    "an offset outside": (lambda i: entry(i).update(offset=[4, 1]), "leave the whole"),
    "a negative offset": (lambda i: entry(i).update(offset=[-4, 0]), "Expected `int` >= 0"),
    "a huge offset": (lambda i: entry(i).update(offset=[2**70, 0]), "rank-1.json"),
    "another shape": (lambda i: entry(i).update(shape=[7, 4]), "has another 'model:uneven'"),
    "an absurd shape": (lambda i: entry(i).update(shape=[2**59, 2**59]), "has another"),
    "other dimensions": (lambda i: entry(i).update(offset=[4]), "dimensions of the whole"),
    "too many dimensions": (lambda i: entry(i).update(shape=[1] * 99), "rank-1.json"),
    "a number that is text": (lambda i: entry(i).update(offset=["4", 0]), "Expected `int`"),
    "a piece that is not there": (lambda i: i["pieces"]["model"].update(w=entry(i)), "has no 'model:w'"),
    "a piece of no tensor": (lambda i: i["pieces"]["model"].pop("uneven"), "nothing says where it belongs"),
    "a tensor of no file": (lambda i: i["pieces"].update(other=i["pieces"].pop("ema")), "has no 'other:"),
    "another rank": (lambda i: i.update(rank=0), "belongs to another checkpoint"),
    "another number of ranks": (lambda i: i.update(ranks=3), "belongs to another checkpoint"),
    "another checkpoint": (lambda i: i.update(checkpoint="E0_U2_S4"), "belongs to another checkpoint"),
    "an unknown key": (lambda i: i.update(code="import os"), "unknown field"),
    "code": (lambda i: i["states"].update(a={"__kind__": "os.system", "value": "true"}), "unknown type"),
    "states that are no dict": (lambda i: i.update(states={"__kind__": "int", "value": "0x1"}), "other callbacks"),
    "states of other callbacks": (lambda i: i["states"].update(a={}), "other callbacks"),
    "no JSON": (lambda i: "{", "rank-1.json"),
    "deep nesting": (lambda i: json.dumps(i)[:-2] + '"a":' + "[" * 9999 + "]" * 9999 + "}}", "rank-1.json"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_pieces_are_refused(paths, name):
    change, problem = FORGERIES[name]
    assert saved(2, paths) == [None, None]
    forge(paths.checkpoints_dir / NAME, change)
    with pytest.raises(CheckpointError, match=problem):
        read_newest(paths)


def test_more_pieces_than_anybody_has_are_not_read(paths, monkeypatch):
    assert saved(2, paths) == [None, None]
    monkeypatch.setattr(shards, "_MOST_BYTES", 100)
    with pytest.raises(CheckpointError, match=r"rank-0.json has \d+ bytes, more than the 100 that are read"):
        read_newest(paths)


def test_shapes_that_agree_and_are_absurd_take_no_memory(paths):
    assert saved(2, paths) == [None, None]
    folder = paths.checkpoints_dir / NAME
    for rank in (0, 1):
        forge(folder, lambda index: entry(index).update(shape=[2**40, 2**40]), rank)
    with pytest.raises(CheckpointError, match="of a tensor of an absurd shape"):
        read_newest(paths)


def test_files_of_ranks_must_be_those_of_all(paths):
    assert saved(3, paths) == [None] * 3
    folder = paths.checkpoints_dir / NAME
    for name in ("rank-1.json", "rank-1.safetensors"):
        (folder / name).unlink()
    sign(folder)
    with pytest.raises(CheckpointError, match=r"rank-\d.json is missing, or one of no rank"):
        read_newest(paths)


def test_a_tensor_is_either_whole_or_in_pieces(paths):
    assert saved(2, paths) == [None] * 2
    folder = paths.checkpoints_dir / NAME
    save_file({"uneven": torch.zeros(7, 3)}, folder / "model.safetensors")
    sign(folder)
    with pytest.raises(CheckpointError, match=r"model.safetensors and files of the ranks both have 'uneven'"):
        read_newest(paths)


@pytest.mark.parametrize("file", ["rank-0.safetensors", "rank-1.safetensors", "rank-1.json", "model.safetensors"])
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_a_checkpoint_that_one_rank_finds_damaged_is_passed_over_by_all(paths, caplog, file, readers):
    for update in (1, 2):
        assert saved(2, paths, update=update) == [None, None]
    path = paths.checkpoints_dir / "E0_U2_S4" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # by which safetensors are still readable
    path.write_bytes(content)
    found = in_threads(readers, lambda world: str(read_newest(paths, world=world).progress))
    assert found == [NAME] * readers
    [message] = [record.getMessage() for record in caplog.records]
    assert f"damaged and skipped: {file} " in message
    with pytest.raises(CheckpointError, match=r"no checkpoint .* can be read"):
        in_threads(readers, lambda world: read_newest(paths, "E0_U2_S4", world))


def test_a_damaged_checkpoint_of_several_ranks_is_replaced_when_it_is_written_again(paths):
    assert saved(2, paths) == [None, None]
    path = paths.checkpoints_dir / NAME / "rank-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert saved(3, paths) == [None] * 3
    assert damage(paths.checkpoints_dir / NAME) is None
