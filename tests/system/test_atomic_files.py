"""Files that get their names when they are complete."""

import pytest

from ksuit_runner.system.atomic_files import append_line, new_file, write_text


def test_a_file_and_those_beside_it_overwrite_nothing(tmp_path):
    beside = tmp_path / "model.onnx.data"
    beside.write_text("another model's")
    with pytest.raises(FileExistsError, match=r"model\.onnx\.data"):
        write(tmp_path)
    assert beside.read_text() == "another model's" and list(tmp_path.iterdir()) == [beside]
    beside.unlink()
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("way", [write_text, append_line])
def test_a_write_that_fails_names_the_file(tmp_path, full_disk, way):
    with pytest.raises(OSError, match="File too large") as raised:
        way(tmp_path / "notes.txt", "text")
    assert raised.value.filename == str(tmp_path / "notes.txt")


def write(folder):
    with new_file(folder / "model.onnx") as file:
        file.write_text("graph")
        file.with_name("model.onnx.data").write_text("weights")
