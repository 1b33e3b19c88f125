"""The loops of two ranks that a good engineer writes by hand, with torch's own DDP and FSDP2."""

from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ksuit_runner.data.digits import Digits
from ksuit_runner.data.python_docs import PythonDocs
from ksuit_runner.models.gpt import Gpt


@dataclass(frozen=True)
class RankTask:
    """What two ranks train.

    Attributes:
        shape: Arguments of a gpt; None for a perceptron 64-128-10 on digits.
        batch: Samples of an update, over both ranks.
        updates: Number of updates.
    """

    shape: dict[str, int] | None
    batch: int
    updates: int

    @property
    def overrides(self) -> list[str]:
        """The same task for the runner."""
        common = [f"data.batch_size={self.batch}", f"trainer.max_updates={self.updates}", "trainer.max_epochs=null"]
        common += ["trainer.clip_norm=null", "checkpoint=at_end", "callbacks=[ema]"]
        if self.shape is None:
            return [*common, "model=mlp", "model.hidden_dims=[128]"]
        return [*common, "data=python_docs", *(f"model.{name}={value}" for name, value in self.shape.items())]

    @cached_property
    def data(self) -> Any:
        return Digits("train") if self.shape is None else PythonDocs("train")

    def model(self) -> nn.Module:
        if self.shape is None:
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        return Gpt(self.data.input_shape, self.data.output_shape, **self.shape)


def ddp(task: RankTask) -> float:
    """Train with ``DistributedDataParallel`` on this rank; return seconds per update."""
    dist.init_process_group("gloo")
    seconds = _train(task, DistributedDataParallel(task.model()))
    # Once the model is gone: were its reducer the last to hold the group, it would wait for the group's threads without
    # releasing the interpreter's lock, for which one of them may be waiting.
    dist.destroy_process_group()
    return seconds


def fsdp(task: RankTask) -> float:
    """Train with ``fully_shard`` on this rank; return seconds per update."""
    dist.init_process_group("gloo")
    model = task.model()
    for block in getattr(model, "blocks", []):
        fully_shard(block)
    fully_shard(model)
    seconds = _train(task, model)
    dist.destroy_process_group()
    return seconds


def _train(task: RankTask, model: nn.Module) -> float:
    rank, size = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, fused=True)
    dist.barrier()
    start = perf_counter()
    for rows in _batches(task):
        own = rows.chunk(size)[rank]
        outputs = model(task.data.inputs[own])
        cross_entropy(outputs.flatten(0, -2), task.data.targets[own].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = perf_counter() - start
    dist.barrier()
    return seconds / task.updates


def _batches(task: RankTask) -> list[Tensor]:
    generator, rows = torch.Generator().manual_seed(0), []
    while len(rows) < task.updates:
        rows += torch.randperm(len(task.data), generator=generator).split(task.batch)[:-1]
    return rows[: task.updates]
