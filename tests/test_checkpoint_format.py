import json
import os
import shutil

import pytest
import torch

from ksuit_runner.checkpoint_format import MODEL, STATE, damage, has_traces, names, read_newest, write_folder
from ksuit_runner.durable_files import write_text
from ksuit_runner.errors import CheckpointError
from ksuit_runner.manifest import MANIFEST
from ksuit_runner.paths import PathProvider

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)}


@pytest.fixture
def paths(tmp_path):
    return PathProvider(tmp_path, "run00000")


def write(paths, name, value=1.0):
    files = {"model": WEIGHTS, "ema": {"layer.weight": torch.full((2,), value)}}
    state = {"trainer": {"x": [1, None, torch.ones(2)]}, "callbacks": {"a": {"best": value}}}
    write_folder(paths.checkpoints_dir / name, files, state, "hash")
    return paths.checkpoints_dir / name


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size * 9 // 10)


def test_what_was_written_is_read_back(paths, bits):
    folder = write(paths, "E1_U3_S9")
    assert {path.name for path in folder.iterdir()} == {MODEL, "ema.safetensors", STATE, MANIFEST}
    found = read_newest(paths)
    assert bits(found.model) == bits(WEIGHTS)
    assert bits(found.state["trainer"]) == bits({"x": [1, None, torch.ones(2)]})
    assert (str(found.progress), found.config_hash, found.paths.checkpoint_dir) == ("E1_U3_S9", "hash", folder)


def test_the_manifest_names_every_file_with_its_size_and_the_versions(paths):
    folder = write(paths, "E1_U3_S9")
    manifest = json.loads((folder / MANIFEST).read_text())
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST
    }
    assert manifest["versions"]["torch"] == torch.__version__


def test_nothing_else_is_left_in_the_folder(paths):
    write(paths, "E1_U3_S9")
    assert [path.name for path in paths.checkpoints_dir.iterdir()] == ["E1_U3_S9"]


def test_names_are_in_the_order_of_updates_newest_first(paths):
    assert names(paths) == []
    for name in ("E0_U9_S9", "E1_U10_S10", "E0_U2_S2"):
        write(paths, name)
    (paths.checkpoints_dir / ".E2_U20_S20.tmp").mkdir()
    write_text(paths.latest, "E1_U10_S10\n")
    assert names(paths) == ["E1_U10_S10", "E0_U9_S9", "E0_U2_S2"]


@pytest.mark.parametrize("change", [flip_a_bit, cut, os.unlink], ids=["bit flipped", "truncated", "missing"])
@pytest.mark.parametrize("name", [MODEL, STATE, "ema.safetensors", MANIFEST])
def test_damage_is_found_and_the_newest_whole_checkpoint_read(paths, caplog, name, change):
    write(paths, "E0_U1_S1")
    write(paths, "E0_U2_S2")
    newest = write(paths, "E0_U3_S3")
    change(newest / name)
    problem = damage(newest)
    assert problem is not None
    assert name in problem or (name, change) == (
        MANIFEST,
        flip_a_bit,
    )  # it says which checksum differs, not which is right
    assert str(read_newest(paths).progress) == "E0_U2_S2"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(newest) in record.message and problem in record.message


def test_every_byte_of_a_file_is_checked(paths):
    folder = write(paths, "E0_U1_S1")
    whole = (folder / STATE).read_bytes()
    for position in range(0, len(whole), 97):
        content = bytearray(whole)
        content[position] ^= 1
        (folder / STATE).write_bytes(content)
        assert damage(folder) is not None, position
    (folder / STATE).write_bytes(whole)
    assert damage(folder) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99, "files": {}}', '{"format": 1, "files": []}'])
def test_a_manifest_that_makes_no_sense_is_damage(paths, text):
    folder = write(paths, "E0_U1_S1")
    (folder / MANIFEST).write_text(text)
    assert MANIFEST in damage(folder)


def test_without_a_whole_checkpoint_there_is_an_error(paths):
    with pytest.raises(CheckpointError, match="run00000 has no checkpoint"):
        read_newest(paths)
    (write(paths, "E0_U1_S1") / STATE).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        read_newest(paths)


def test_a_named_checkpoint_is_read_and_no_other(paths):
    write(paths, "E0_U1_S1")
    write(paths, "E0_U2_S2")
    assert read_newest(paths, "E0_U1_S1").progress.update == 1
    cut(paths.checkpoints_dir / "E0_U1_S1" / MODEL)
    with pytest.raises(CheckpointError):
        read_newest(paths, "E0_U1_S1")


def test_a_damaged_folder_and_a_left_over_are_replaced(paths):
    folder = write(paths, "E0_U1_S1")
    cut(folder / MODEL)
    temporary = folder.with_name(".E0_U1_S1.tmp")
    temporary.mkdir()
    (temporary / "left_over").write_text("of a process that was killed")
    write(paths, "E0_U1_S1", value=2.0)
    assert read_newest(paths).state["callbacks"] == {"a": {"best": 2.0}}
    assert not (folder / "left_over").exists()
    assert not temporary.exists()


class Unsafe:
    pass


def test_objects_are_not_unpickled(paths):
    write_folder(paths.checkpoints_dir / "E0_U1_S1", {"model": WEIGHTS}, {"trainer": Unsafe()}, "hash")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        read_newest(paths)


def test_a_small_file_is_replaced(tmp_path):
    write_text(tmp_path / "latest", "a")
    write_text(tmp_path / "latest", "b")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("latest", "b")]


def test_a_run_has_traces_of_checkpoints_unless_it_never_had_one(paths, tmp_path):
    folder = paths.checkpoints_dir
    assert has_traces(paths) is False
    (folder / ".E0_U1_S1.tmp").mkdir(parents=True)
    assert has_traces(paths) is False
    (folder / "E0_U1_S1").mkdir()
    assert has_traces(paths) is True
    shutil.rmtree(folder)
    folder.write_text("a file in its place")
    assert has_traces(paths) is True
    folder.unlink()
    folder.symlink_to(tmp_path / "nowhere")
    assert has_traces(paths) is True
