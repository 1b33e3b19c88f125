"""Runs whose state is spread over ranks: killed while they write a checkpoint, resumed, and read by one process."""

import os
import signal
from pathlib import Path

import pytest
import torch
from command import checkpoint_bytes, run_dir
from ranks import Ranks, on_ranks
from safetensors.torch import load_file

from ksuit_runner import run
from ksuit_runner.checkpoint import shards
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.cli.export import export
from ksuit_runner.errors import PeerError
from ksuit_runner.paths import PathProvider

FSDP = ("trainer=fsdp", "model=mlp", "model.hidden_dims=[9]", "callbacks=[ema,accuracy]", "tracker=noop", "name=one")


def train(folder: Path, *arguments: str) -> str:
    return run([f"output_dir={folder}", *arguments]).status


def train_and_die(folder: Path, victim: int, *arguments: str) -> str:
    """Train, and be killed between the files of this rank of the second checkpoint."""
    real, seen = shards.write_file, []

    def write(path, content):
        seen.append(path.name)
        if seen.count(f"rank-{victim}.json") == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, content)

    shards.write_file = write
    try:
        return train(folder, *arguments)
    except PeerError as error:
        return str(error)


@pytest.mark.soak
def test_a_rank_that_is_killed_in_a_commit_costs_no_bit_of_the_run(tmp_path):
    assert on_ranks(2, train, tmp_path / "whole", *FSDP, "trainer.max_epochs=3") == ["FINISHED"] * 2
    with Ranks() as ranks:
        one, other = ranks.start(2, train_and_die, tmp_path / "hit", 1, *FSDP, "trainer.max_epochs=3")
        with pytest.raises(AssertionError, match="exit code -9"):
            other.result()
        assert "rank 1" in one.result()
    hit = run_dir(tmp_path / "hit")
    there = sorted(path.name for path in (hit / "artifacts/checkpoints").iterdir() if not path.name.startswith("."))
    assert there == ["E1_U20_S1280", "latest", "tags.json"], "half a checkpoint was committed"

    assert on_ranks(2, train, tmp_path / "hit", "resume=one") == ["FINISHED"] * 2
    whole = run_dir(tmp_path / "whole")
    ends = [{name: text for name, text in checkpoint_bytes(item).items() if "E3_" in name} for item in (hit, whole)]
    assert ends[0] == ends[1] and len(ends[0]) == 8
    assert not [path for path in (hit / "artifacts/checkpoints").iterdir() if path.name.startswith(".")]

    target = tmp_path / "ema.safetensors"
    export("one/ema", [f"output_dir={tmp_path / 'hit'}", f"export_to={target}"])
    found, read = load_file(target), read_newest(PathProvider(tmp_path / "hit", hit.name))
    assert found.keys() == read.model.keys()
    assert all(torch.isfinite(value).all() and value.shape == read.model[name].shape for name, value in found.items())
