"""A tiny checkpoint that is handed over as one file becomes the folder that it would have been, or is dropped."""

import json
import os
import shutil

import pytest
import torch
from stored_checkpoint import hand_over_checkpoint, store_checkpoint

from ksuit_runner.checkpoint import commit as commit_module
from ksuit_runner.checkpoint.commit import Committer
from ksuit_runner.checkpoint.folders import names, needs_recovery
from ksuit_runner.checkpoint.format import pack_state, read_newest
from ksuit_runner.checkpoint.manifest import _seal
from ksuit_runner.paths import PathProvider

NAME = "E0_U2_S4"


@pytest.fixture
def paths(tmp_path):
    paths = PathProvider(tmp_path / "packed", "run00000")
    store_checkpoint(paths, "E0_U1_S2", content())
    return paths


def content():
    weights = {"w": torch.arange(6.0).reshape(2, 3), "turned": torch.arange(6).reshape(2, 3).t()}
    return pack_state({"model": weights, "ema": {}}, {"trainer": {"a": (1, float("nan"))}, "callbacks": {}})


def ready(paths):
    hand_over_checkpoint(paths, NAME, content(), tags=["best"], is_packed=True)
    return paths.checkpoints_dir / f".{NAME}.ready"


def left(paths):
    return sorted(path.name for path in paths.checkpoints_dir.iterdir())


def test_the_folder_is_the_same_byte_for_byte(paths, tmp_path):
    ready(paths)
    Committer(paths).recover()
    other = store_checkpoint(PathProvider(tmp_path / "folder", "run00000"), NAME, content(), tags=["best"])
    found, expected = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (paths.checkpoints_dir / NAME, other)
    )
    assert found == expected and len(found) == 5
    assert left(paths) == ["E0_U1_S2", NAME, "latest", "tags.json"]
    assert read_newest(paths).model["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_the_file_is_whole_where_the_system_takes_it_piece_by_piece(paths, monkeypatch):
    whole = ready(paths).read_bytes()
    monkeypatch.setattr(os, "writev", lambda file, pieces: os.write(file, pieces[0][:7]))
    assert ready(paths).read_bytes() == whole


def parts(file):
    text = file.read_bytes()
    end = 8 + int.from_bytes(text[:8], "little")
    return json.loads(text[8:end]), text[end:]


def rewrite(file, **changes):
    """Write a manifest with other values that vouches for itself, as a careful forger would."""
    body, rest = parts(file)
    text = _seal({**{key: value for key, value in body.items() if key != "crc32"}, **changes}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def add_file(file, name, size=0):
    rewrite(file, files={**parts(file)[0]["files"], name: {"size": size, "crc32": 0}})


def flip(file, position):
    text = bytearray(file.read_bytes())
    text[position] ^= 1
    file.write_bytes(text)


def link(file):
    shutil.move(file, file.with_name("elsewhere"))
    file.symlink_to(file.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: file.write_bytes(b""), "manifest.json is not JSON"),
        (lambda file: os.truncate(file, 5), "manifest.json has .* bytes, more than|manifest.json is not JSON"),
        (lambda file: os.truncate(file, 300), "manifest.json is not JSON"),
        (lambda file: os.truncate(file, file.stat().st_size - 1), "trainer.safetensors is cut off"),
        (lambda file: file.write_bytes(file.read_bytes() + b"1"), "it is longer than its manifest says"),
        (lambda file: flip(file, 2), "manifest.json .*"),
        (lambda file: flip(file, 7), "manifest.json has .* bytes, more than the 1,000,000 that are read"),
        (lambda file: flip(file, 30), "manifest.json .*"),
        (lambda file: flip(file, -1), "trainer.safetensors is not what was written"),
        (lambda file: rewrite(file, name="E0_U3_S6"), "manifest.json belongs to another checkpoint"),
        (lambda file: add_file(file, "../evil.json"), "manifest.json names a file outside of its folder"),
        (lambda file: add_file(file, "evil.py"), "it holds evil.py, which is no file of a checkpoint"),
        (lambda file: add_file(file, "manifest.json"), "it holds manifest.json, which is no file of a checkpoint"),
        (lambda file: add_file(file, "z.json", 1 << 60), "z.json is cut off"),
        (lambda file: add_file(file, "z.json", -1), "manifest.json does not fit its schema"),
        (link, "is a link"),
    ],
)
def test_what_is_damaged_or_forged_is_dropped_and_nothing_else_changes(paths, change, problem):
    change(ready(paths))
    before = set(paths.run_dir.parent.rglob("*"))
    with pytest.raises(OSError, match=f"what was written is damaged, .*({problem})"):
        Committer(paths).commit(NAME)
    now = set(paths.run_dir.parent.rglob("*"))
    assert now < before and {path.name for path in before - now} == {f".{NAME}.ready"}
    assert names(paths) == ["E0_U1_S2"]


@pytest.mark.parametrize("step", ["unpack", "_read_back", "_drop", "write_text"])
def test_a_committer_that_is_killed_has_the_file_until_the_checkpoint_is_whole(paths, monkeypatch, step):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    ready(paths)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(commit_module, step, kill)
        Committer(paths).commit(NAME)
    assert needs_recovery(paths) is (step != "write_text")
    Committer(paths).recover()
    assert left(paths) == ["E0_U1_S2", NAME, "latest", "tags.json"] and read_newest(paths, NAME).tags == ("best",)


def test_one_that_is_superseded_is_dropped_unread_and_half_unpacked_ones_go(paths, monkeypatch):
    ready(paths)
    hand_over_checkpoint(paths, "E0_U1_S3", content(), keep_last=1, is_packed=True)
    (paths.checkpoints_dir / ".E0_U9_S9.unpacked").mkdir()
    unpacked = []

    def unpack(packed, folder, *given, unpack=commit_module.unpack):
        unpacked.append(folder.name)
        return unpack(packed, folder, *given)

    monkeypatch.setattr(commit_module, "unpack", unpack)
    Committer(paths).recover()
    assert unpacked == [f".{NAME}.unpacked"] and left(paths) == ["E0_U1_S2", NAME, "latest", "tags.json"]
