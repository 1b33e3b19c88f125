from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file

from ksuit_runner.checkpoint.weights_writer import WeightsWriter
from ksuit_runner.counter import Progress
from ksuit_runner.errors import TakenOverError


def taken_over():
    raise TakenOverError("another process has it")


def test_a_run_that_was_taken_over_writes_and_removes_nothing(tmp_path):
    first, second = Progress(1, 20, 1440), Progress(2, 40, 2880)
    own, former = WeightsWriter(tmp_path, 1, lambda: None), WeightsWriter(tmp_path, 1, taken_over)
    own.write(first, {"model": {"a": torch.ones(2)}})
    own.wait()
    former.write(second, {"model": {"a": torch.zeros(2)}})
    with pytest.raises(TakenOverError):
        former.wait()
    with pytest.raises(TakenOverError):
        former.remove_after(0)
    assert [path.name for path in tmp_path.iterdir()] == [str(first)]
    for writer in (own, former):
        writer.close()


def test_what_is_written_is_what_training_had_then_and_a_failure_leaves_nothing(tmp_path):
    writer, tensor = WeightsWriter(tmp_path, None, lambda: None), torch.ones(2)
    writer.write(Progress(1, 20, 1440), {"model": {"a": tensor}})
    tensor.zero_()
    writer.wait()
    assert load_file(tmp_path / "E1_U20_S1440" / "model.safetensors")["a"].tolist() == [1, 1]
    (tmp_path / ".E2_U40_S2880.tmp").mkdir()
    (tmp_path / ".E2_U40_S2880.tmp" / "half").touch()  # of a process that was killed
    writer.write(Progress(2, 40, 2880), {"folder/of/nobody": {"a": tensor}})
    with suppress(FileNotFoundError):
        writer.wait()
        pytest.fail("it was written")
    assert [path.name for path in tmp_path.iterdir()] == ["E1_U20_S1440"]
    writer.close()
