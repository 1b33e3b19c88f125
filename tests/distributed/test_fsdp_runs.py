"""Runs with strategy=fsdp: killed and resumed to the bit on as many ranks and on others, and nearly so on one."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from command import checkpoint_bytes, journal, run_dir
from ranks import Ranks, on_ranks
from safetensors.torch import load_file
from torch import Tensor

from ksuit_runner import run
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.distributed.fsdp import has_fsdp
from ksuit_runner.distributed.pieces import whole
from ksuit_runner.paths import PathProvider
from ksuit_runner.trainer.update import Update

pytestmark = pytest.mark.skipif(not has_fsdp(), reason="this version of torch has no FSDP2 that would do")

# Dropout, rows that do not divide, an uneven last batch, buffers, and two parts for each of two ranks.
SETTINGS = (
    "model=cnn",
    "optimizer=sgd",
    "data.batch_size=50",
    "data.drop_last=false",
    "trainer.accumulation_steps=4",
    "trainer.max_updates=30",
    "callbacks=[ema,swa,accuracy,weights_checkpoint]",
    "callbacks.swa.modules=[stages.0]",
    "callbacks.swa.start_epoch=0",
    "callbacks.swa.start_update=4",
    "callbacks.swa.every_n_updates=3",
    "callbacks.weights_checkpoint.weights=[model,ema,swa]",
    "+callbacks.accuracy.every_n_updates=10",
    "checkpoint=every_100_updates",
    "checkpoint.every_n_updates=5",
    "checkpoint.keep_last=4",
    "trainer.device=cpu",
    "tracker=noop",
)


def weights(output_dir: Path) -> dict[str, Tensor]:
    """Return all tensors of the last checkpoint: the model's, the average's, and the optimizer's."""
    checkpoint = read_newest(PathProvider(output_dir, run_dir(output_dir).name))
    found = {f"model/{name}": whole(value) for name, value in checkpoint.model.items()}
    for file in (run_dir(output_dir) / "artifacts/weights").rglob("*.safetensors"):
        found |= {f"{file.parent.name}/{file.stem}/{name}": value for name, value in load_file(file).items()}
    state = checkpoint.state["trainer"]["optimizer"]["parameters"]
    found |= {f"{name}/{key}": whole(value) for name, values in state.items() for key, value in values.items()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def assert_same(one: Path, other: Path) -> None:
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not value.equal(expected[name])] == []
    assert journal(run_dir(one)) == journal(run_dir(other))


def train(folder: Path, *arguments: str) -> str:
    return run([f"output_dir={folder}", *arguments]).status


def train_and_die(folder: Path, updates: int, *arguments: str) -> None:
    """Train, and be killed in the middle of an update, like all other ranks."""
    real, left = Update.forward, iter(range(2 * updates))

    def forward(self: Update, *given: Any) -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *given)

    Update.forward = forward  # type: ignore[method-assign]
    train(folder, *arguments)


def test_killed_and_resumed_on_as_many_ranks_others_and_one(tmp_path):
    undisturbed, killed, alone, more = (tmp_path / name for name in ("undisturbed", "killed", "alone", "more"))
    assert on_ranks(2, train, undisturbed, *SETTINGS, "strategy=fsdp") == ["FINISHED"] * 2
    with Ranks() as ranks:
        for rank in ranks.start(2, train_and_die, killed, 13, *SETTINGS, "strategy=fsdp"):
            with pytest.raises(AssertionError, match="exit code -9"):
                rank.result()
    assert on_ranks(2, train, killed, "resume=last") == ["FINISHED"] * 2
    assert checkpoint_bytes(run_dir(killed)) == checkpoint_bytes(run_dir(undisturbed))
    assert journal(run_dir(killed)) == journal(run_dir(undisturbed))
    shutil.copytree(undisturbed, more)
    for folder in run_dir(more).glob("artifacts/checkpoints/E*_U[23]*"):
        shutil.rmtree(folder)
    assert on_ranks(4, train, more, "resume=last") == ["FINISHED"] * 4
    assert train(alone, *SETTINGS, "strategy=fsdp") == "FINISHED"
    assert_same(more, undisturbed)
    found, expected = weights(alone), weights(undisturbed)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        difference = torch.linalg.vector_norm((value - expected[name]).double())
        limit = 1e-7 if name.startswith("model/") else 1e-6
        assert difference <= limit * torch.linalg.vector_norm(expected[name].double()), name
    assert journal(run_dir(alone)) == pytest.approx(journal(run_dir(undisturbed)), rel=1e-6)
