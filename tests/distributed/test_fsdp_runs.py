"""Runs with strategy=fsdp: killed and resumed to the bit on as many ranks, and nearly the same on any number."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from command import checkpoint_bytes, journal, last_step, run_dir
from ranks import Commands, ksuit_on_ranks
from torch import Tensor

from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.distributed.pieces import whole
from ksuit_runner.paths import PathProvider

# Dropout, rows that do not divide, an uneven last batch, buffers, and two parts for each of two ranks.
SETTINGS = (
    "model=cnn",
    "optimizer=sgd",
    "data.batch_size=50",
    "data.drop_last=false",
    "trainer.accumulation_steps=4",
    "trainer.max_updates=30",
    "callbacks=[ema,accuracy]",
    "+callbacks.accuracy.every_n_updates=10",
    "checkpoint=every_100_updates",
    "checkpoint.every_n_updates=5",
    "trainer.device=cpu",
    "tracker=noop",
)


def weights(output_dir: Path) -> dict[str, Tensor]:
    """Return all tensors of the last checkpoint: the model's, the average's, and the optimizer's."""
    checkpoint = read_newest(PathProvider(output_dir, run_dir(output_dir).name))
    found = {f"model/{name}": whole(value) for name, value in checkpoint.model.items()}
    state = checkpoint.state["trainer"]["optimizer"]["parameters"]
    found |= {f"{name}/{key}": whole(value) for name, values in state.items() for key, value in values.items()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def assert_near(one: Path, other: Path) -> None:
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-7, msg=lambda text, name=name: name + text)
    assert journal(run_dir(one)) == pytest.approx(journal(run_dir(other)), rel=1e-4)


def test_killed_and_resumed_on_as_many_ranks_others_and_one(tmp_path):
    undisturbed, killed, alone, more = (tmp_path / name for name in ("undisturbed", "killed", "alone", "more"))
    ksuit_on_ranks(undisturbed, 2, *SETTINGS, "strategy=fsdp")
    with Commands(killed, 2, *SETTINGS, "strategy=fsdp") as commands:
        deadline = time.monotonic() + 120
        while last_step(killed) < 12:
            assert time.monotonic() < deadline, commands.output()
            time.sleep(0.005)
    shutil.copytree(killed, more)
    ksuit_on_ranks(killed, 2, "resume=last")
    assert checkpoint_bytes(run_dir(killed)) == checkpoint_bytes(run_dir(undisturbed))
    assert journal(run_dir(killed)) == journal(run_dir(undisturbed))
    ksuit_on_ranks(more, 4, "resume=last")
    ksuit_on_ranks(alone, 1, *SETTINGS)
    assert_near(more, undisturbed)
    assert_near(alone, undisturbed)
