"""The manifest detects damage of every file of a checkpoint and of itself."""

import errno
import json

import pytest

from ksuit_runner.checkpoint import manifest
from ksuit_runner.checkpoint.manifest import MANIFEST, _seal, manifest_text, read_manifest, verify, write_file
from ksuit_runner.system.untrusted_files import UnsafeFileError

NAME = "E1_U2_S4"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / NAME
    folder.mkdir()
    files = {"trainer.json": [], "a.safetensors": [b"weights" * 500, memoryview(b"weights" * 500)]}
    files = {name: write_file(folder / name, parts) for name, parts in files.items()}
    (folder / MANIFEST).write_text(manifest_text(files, NAME, "hash", False, {"torch": "2"}, 3, ["best"]))
    return folder


def problem(folder):
    try:
        verify(folder, folder.parent)
    except UnsafeFileError as error:
        return str(error)
    return None


def sealed(folder, **changes):
    """Write a manifest with other values that vouches for itself: as a careful forger would, or another version."""
    body = {**read_manifest(folder, folder.parent), **changes}
    del body["crc32"]
    (folder / MANIFEST).write_text(_seal(body))


def test_a_manifest_describes_what_was_written(folder):
    found = verify(folder, folder.parent)
    assert found["files"]["trainer.json"] == {"size": 0, "crc32": 0}
    assert found["files"]["a.safetensors"]["size"] == 7000
    assert (found["name"], found["config_hash"], found["unfinished"]) == (NAME, "hash", False)
    assert (found["tags"], found["versions"], found["keep_last"]) == (["best"], {"torch": "2"}, 3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *[("false", "true"), ('"hash"', '"hasi"'), ('"best"', '"rest"'), ('"torch": "2"', '"torch": "3"')],
        *[('"best"', '"best", "worst"'), ("\n", "\n "), ('"size": 0', '"size": 0.0')],
    ],
)
def test_a_change_of_its_own_text_is_detected(folder, old, new):
    text = (folder / MANIFEST).read_text()
    assert text.count(old) >= 1
    (folder / MANIFEST).write_text(text.replace(old, new, 1))
    assert problem(folder).startswith(f"{MANIFEST} ")


def test_a_change_of_a_file_is_detected_at_any_size(folder):
    for content in (b"weights" * 999, b"Weights" * 1000, b""):
        (folder / "a.safetensors").write_bytes(content)
        assert problem(folder) == "a.safetensors is not what was written"


def test_of_a_file_that_is_not_read_the_size_is_checked(folder):
    (folder / "a.safetensors").write_bytes(b"Weights" * 1000)
    verify(folder, folder.parent, reads=lambda file: False)
    (folder / "a.safetensors").write_bytes(b"weights" * 999)
    with pytest.raises(UnsafeFileError, match="a.safetensors is not what was written"):
        verify(folder, folder.parent, reads=lambda file: False)


def test_missing_and_additional_files_are_detected(folder):
    (folder / ".nfs1234").write_text("left by a network file system")
    assert problem(folder) is None
    (folder / "more").write_text("")
    assert problem(folder) == "more is not among the files that were written"
    (folder / "more").unlink()
    (folder / "trainer.json").unlink()
    assert problem(folder) == "trainer.json is missing"


def test_a_disk_that_cannot_be_read_is_named_with_the_file(folder, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifest, "fingerprint", fail)
    assert problem(folder) == "a.safetensors cannot be read (Input/output error)"


ENTRY = {"size": 0, "crc32": 0}


@pytest.mark.parametrize(
    "file", ["../trainer.json", "..", ".hidden", "", "a/b", "a\\b", "c:b", "a\nb", "n" * 201, "/etc/passwd"]
)
def test_it_names_files_of_its_folder_only(folder, file):
    sealed(folder, files={file: ENTRY})
    assert problem(folder) == f"{MANIFEST} names a file outside of its folder"


@pytest.mark.parametrize("length", [1, 200])
def test_a_name_may_have_200_characters(folder, length):
    (folder / ("n" * length)).write_text("")
    sealed(folder, files={**read_manifest(folder, folder.parent)["files"], "n" * length: ENTRY})
    assert problem(folder) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "has format 1, and this version of ksuit_runner reads 2"),
        ({"name": "E1_U3_S6"}, "belongs to another checkpoint"),
        ({"keep_last": None}, "does not fit its schema: Expected `int`, got `null` - at `$.keep_last`"),
        ({"keep_last": 0}, "does not fit its schema: Expected `int` >= 1 - at `$.keep_last`"),
        ({"tags": ["best", 1]}, "does not fit its schema: Expected `str`, got `int` - at `$.tags[1]`"),
        ({"tags": {}}, "does not fit its schema: Expected `array`, got `object` - at `$.tags`"),
        ({"unfinished": 1}, "does not fit its schema: Expected `bool`, got `int` - at `$.unfinished`"),
        ({"more": 1}, "does not fit its schema: Object contains unknown field `more`"),
        ({"files": {"a": []}}, "does not fit its schema: Expected `object`, got `array` - at `$.files[...]`"),
        *(
            ({"files": {"a": {"crc32": 0, **size}}}, f"does not fit its schema: {message} - at `$.files[...]{at}`")
            for size, message, at in (
                ({}, "Object missing required field `size`", ""),
                ({"size": 1, "more": 1}, "Object contains unknown field `more`", ""),
                ({"size": "0"}, "Expected `int`, got `str`", ".size"),
                ({"size": True}, "Expected `int`, got `bool`", ".size"),
            )
        ),
    ],
)
def test_an_invalid_manifest_is_refused_even_with_a_valid_checksum(folder, changes, message):
    sealed(folder, **changes)
    assert problem(folder) == f"{MANIFEST} {message}"


def test_a_text_that_is_not_an_object_is_refused(folder):
    for text in ("", "[]", "null", "{", json.dumps("x")):
        (folder / MANIFEST).write_text(text)
        assert problem(folder).startswith(MANIFEST)
