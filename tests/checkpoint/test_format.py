import errno
import json
import os
import re
import shutil

import pytest
import safetensors
import torch
from stored_checkpoint import store_checkpoint

from ksuit_runner.checkpoint import folders
from ksuit_runner.checkpoint import format as checkpoint_format
from ksuit_runner.checkpoint.folders import damage, has_traces, names
from ksuit_runner.checkpoint.format import MODEL, STATE, STATE_TENSORS, Content, pack_state, read_newest
from ksuit_runner.checkpoint.manifest import MANIFEST, fingerprint, manifest_text
from ksuit_runner.checkpoint.shards import Shard
from ksuit_runner.checkpoint.state_types import KIND
from ksuit_runner.errors import CheckpointError
from ksuit_runner.paths import PathProvider
from ksuit_runner.system.atomic_files import write_text

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)}


BOTH = {"model": WEIGHTS, "trainer": {}}


@pytest.fixture
def paths(tmp_path):
    return PathProvider(tmp_path, "run00000")


def write(paths, name, value=1.0, **options):
    files = {"model": WEIGHTS, "ema": {"layer.weight": torch.full((2,), value)}}
    state = {"trainer": {"x": [1, None, torch.ones(2)]}, "callbacks": {"a": {"best": value}}}
    return store_checkpoint(paths, name, pack_state(files, state), **options)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size * 9 // 10)


def test_what_was_written_is_read_back(paths, bits):
    folder = write(paths, "E1_U3_S9")
    assert {path.name for path in folder.iterdir()} == {MODEL, "ema.safetensors", STATE_TENSORS, STATE, MANIFEST}
    found = read_newest(paths)
    assert bits(found.model) == bits(WEIGHTS)
    assert bits(found.state["trainer"]) == bits({"x": [1, None, torch.ones(2)]})
    assert (str(found.progress), found.config_hash, found.paths.checkpoint_dir) == ("E1_U3_S9", "hash", folder)


def test_the_manifest_has_every_file_with_its_size_and_the_versions(paths):
    folder = write(paths, "E1_U3_S9")
    manifest = json.loads((folder / MANIFEST).read_text())
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST
    }
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["unfinished"] is False


def test_nothing_else_is_left_in_the_folder(paths):
    write(paths, "E1_U3_S9")
    assert sorted(path.name for path in paths.checkpoints_dir.iterdir()) == ["E1_U3_S9", "latest", "tags.json"]


def test_names_are_in_the_order_of_updates_newest_first(paths):
    assert names(paths) == []
    for name in ("E0_U9_S9", "E1_U10_S10", "E0_U2_S2"):
        write(paths, name)
    (paths.checkpoints_dir / ".E2_U20_S20.tmp").mkdir()
    write_text(paths.latest, "E1_U10_S10\n")
    assert names(paths) == ["E1_U10_S10", "E0_U9_S9", "E0_U2_S2"]


@pytest.mark.parametrize("change", [flip_a_bit, cut, os.unlink], ids=["bit flipped", "truncated", "missing"])
@pytest.mark.parametrize("name", [MODEL, STATE_TENSORS, STATE, "ema.safetensors", MANIFEST])
def test_damage_is_found_and_the_newest_intact_checkpoint_is_read(paths, caplog, name, change):
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
    for position in range(0, len(whole), 11):
        content = bytearray(whole)
        content[position] ^= 1
        (folder / STATE).write_bytes(content)
        assert damage(folder) is not None, position
    (folder / STATE).write_bytes(whole)
    assert damage(folder) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99, "files": {}}', '{"format": 1, "files": []}'])
def test_an_invalid_manifest_is_damage(paths, text):
    folder = write(paths, "E0_U1_S1")
    (folder / MANIFEST).write_text(text)
    assert MANIFEST in damage(folder)


def test_without_an_intact_checkpoint_there_is_an_error(paths):
    with pytest.raises(CheckpointError, match="run00000 has no checkpoint"):
        read_newest(paths)
    (write(paths, "E0_U1_S1") / STATE).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        read_newest(paths)


@pytest.fixture
def goes_on(paths, monkeypatch):
    """A run that goes on: twice, while its newest checkpoint is read, it writes the next one and removes the others."""
    write(paths, "E0_U1_S1")
    updates, verify = [2, 3], checkpoint_format.verify

    def continued(folder, *args, **kwargs):
        if updates:
            newest = write(paths, "E0_U{0}_S{0}".format(updates.pop(0)))
            for name in names(paths):
                if name != newest.name:
                    shutil.rmtree(paths.checkpoints_dir / name)
        return verify(folder, *args, **kwargs)

    monkeypatch.setattr(checkpoint_format, "verify", continued)


def test_of_a_run_that_goes_on_the_checkpoint_that_is_the_newest_by_now_is_read(paths, goes_on, caplog):
    assert str(read_newest(paths).progress) == "E0_U3_S3"
    assert caplog.messages == []


def test_a_named_checkpoint_that_is_removed_while_it_is_read_is_not_called_damaged(paths, goes_on, caplog):
    with pytest.raises(CheckpointError, match=r"E0_U1_S1 was removed while .*is going on. There are: E0_U2_S2$"):
        read_newest(paths, "E0_U1_S1")
    assert caplog.messages == []


def test_a_named_checkpoint_is_read_and_no_other(paths):
    write(paths, "E0_U1_S1")
    write(paths, "E0_U2_S2")
    assert read_newest(paths, "E0_U1_S1").progress.update == 1
    cut(paths.checkpoints_dir / "E0_U1_S1" / MODEL)
    with pytest.raises(CheckpointError):
        read_newest(paths, "E0_U1_S1")


def test_a_folder_behind_a_link_has_no_checkpoints(paths, tmp_path):
    write(paths, "E0_U1_S1")
    paths.checkpoints_dir.rename(tmp_path / "elsewhere")
    paths.checkpoints_dir.symlink_to(tmp_path / "elsewhere")
    assert names(paths) == []


def test_the_folder_of_all_runs_may_be_a_link_and_that_of_one_run_not(paths, tmp_path):
    folder = write(paths, "E0_U1_S1")
    for linked, is_whole in ((paths.runs_dir, True), (paths.run_dir, False)):
        linked.rename(tmp_path / "elsewhere")
        linked.symlink_to(tmp_path / "elsewhere")
        assert (damage(folder) is None) == is_whole
        linked.unlink()
        (tmp_path / "elsewhere").rename(linked)


def test_a_disk_that_cannot_be_read_is_damage(paths, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    folder = write(paths, "E0_U1_S1")
    for module in (checkpoint_format, folders):
        monkeypatch.setattr(module, "verify", fail)
    assert damage(folder) == "it cannot be read (Input/output error)"
    with pytest.raises(CheckpointError, match=r"can be read\n  E0_U1_S1: it cannot be read \(Input/output error\)"):
        read_newest(paths)


@pytest.mark.parametrize(
    ("files", "document", "problem"),
    [
        ({"trainer": {}}, {"trainer": {}, "callbacks": {}}, f"{MODEL} is missing"),
        ({"model": WEIGHTS}, {"trainer": {}, "callbacks": {}}, f"{STATE_TENSORS} is missing"),
        (BOTH, {"trainer": {}}, f"{STATE} cannot be loaded (it is not the state of a trainer and its callbacks"),
        (BOTH, {"trainer": {}, "callbacks": {}, "model": []}, "it is not the state of a trainer"),
        (BOTH, {"trainer": {}, "callbacks": {KIND: "dict", "items": [[1, {}]]}}, "a callback is not a string"),
        (BOTH, {KIND: "Evil"}, f"{STATE} cannot be loaded (it has a value of an unknown type, 'Evil'"),
    ],
)
def test_an_intact_checkpoint_of_something_else_is_damaged(paths, files, document, problem):
    folder = store_checkpoint(paths, "E0_U1_S1", Content(files, document, Shard()))
    assert damage(folder) is None
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        read_newest(paths)


def sealed(folder):
    """Write a manifest for what is in a folder now."""
    (folder / MANIFEST).unlink(missing_ok=True)
    files = {path.name: fingerprint(path) for path in folder.iterdir()}
    (folder / MANIFEST).write_text(manifest_text(files, folder.name, "hash", False, {}, keep_last=2))


@pytest.mark.parametrize(
    ("file", "content"),
    [*((file, "something else") for file in ("ema.safetensors", MODEL, STATE_TENSORS, STATE)), (STATE, "[" * 10**5)],
    ids=range(5),
)
def test_every_file_is_opened_those_of_callbacks_as_well(paths, file, content):
    folder = write(paths, "E0_U1_S1")
    (folder / file).write_text(content)
    sealed(folder)
    assert damage(folder) is None
    with pytest.raises(CheckpointError, match=f"E0_U1_S1: {file} cannot be loaded"):
        read_newest(paths)


def test_every_file_can_be_read_without_the_runner(paths):
    folder = write(paths, "E0_U1_S1")
    values = json.loads((folder / STATE).read_text(), parse_constant=pytest.fail)
    assert values["trainer"]["x"][:2] == [1, None] and values["callbacks"] == {"a": {"best": 1.0}}
    key = values["trainer"]["x"][2]["key"]
    assert key == "/trainer/x/2"
    with safetensors.safe_open(folder / STATE_TENSORS, "np") as file:
        assert file.get_tensor(key).tolist() == [1.0, 1.0]


def test_a_checkpoint_of_an_earlier_version_is_explained(paths):
    folder = write(paths, "E0_U1_S1")
    text = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**text, "format": 1}, indent=2) + "\n")
    with pytest.raises(CheckpointError, match="has format 1, and this version of ksuit_runner reads 2"):
        read_newest(paths)


@pytest.mark.parametrize(("count", "listed"), [(0, "none"), (5, "U5_S5, .*, E0_U1_S1"), (6, "U6_S6, .*, E0_U2_S2 …")])
def test_an_unknown_name_is_refused_with_the_first_existing_ones(paths, count, listed):
    for update in range(1, count + 1):
        (paths.checkpoints_dir / f"E0_U{update}_S{update}").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"has no checkpoint 'best'. There are: .*{listed}$"):
        read_newest(paths, "best")


SPARSE = torch.eye(2).to_sparse()


def test_values_that_fit_no_file_go_into_the_state_for_a_model_and_are_refused_for_a_callback():
    model = {"w": WEIGHTS["steps"], "sparse": SPARSE, "__metadata__": WEIGHTS["steps"]}
    content = pack_state({"model": model, "ema": WEIGHTS}, {})
    tensors, state, held = content.files, content.document, content.files.pop("trainer")
    assert tensors == {"model": {"w": WEIGHTS["steps"]}, "ema": WEIGHTS}
    assert state.keys() == {"trainer", "callbacks", "model"} and state["model"].keys() == {"sparse", "__metadata__"}
    assert held.keys() == {"/model/sparse/indices", "/model/sparse/values", "/model/__metadata__"}
    assert pack_state({"model": WEIGHTS}, {}).document == {"trainer": {}, "callbacks": {}}
    with pytest.raises(CheckpointError, match="^ema.safetensors: 'sparse' is not a dense tensor"):
        pack_state({"model": {}, "ema": {"sparse": SPARSE}}, {})


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
