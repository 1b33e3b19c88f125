"""How fast samples come, beside torch's DataLoader, and what switching to an evaluation and back costs."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import TensorDataset as TorchTensorDataset

from ksuit_runner.counter import Interval, UpdateCounter
from ksuit_runner.data.batch_plan import Evaluation
from ksuit_runner.data.container import DataContainer
from ksuit_runner.data.tensor_dataset import TensorDataset

from .measure import Contest, Scale, Spread, compete
from .result import Result, Value

BATCH = 64
MEMORY, COSTLY = "tensors in memory", "costly samples"


class Costly(torch.utils.data.Dataset):
    """Samples that take about as long as decoding and augmenting a small image."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = np.random.default_rng(index).random((3, 48, 48), dtype=np.float32)
        image = image[:, :: -1 if torch.rand(()) < 0.5 else 1]
        return torch.from_numpy(np.ascontiguousarray((image - image.mean()) / image.std())), index % 10


def measure(scale: Scale, folder: Path) -> Result:
    result = Result(f"Data: samples per second in batches of {BATCH}, and evaluations in between")
    samples = {MEMORY: scale.pick(64_000, 640), COSTLY: scale.pick(6_400, 128)}
    for name, count in samples.items():
        for workers in (0, 2):
            contestants = {
                "runner": partial(_runner, name, count, workers),
                "DataLoader": partial(_data_loader, name, count, workers),
            }
            contest = compete(contestants, scale.turns(5 if workers else 7), warm_up=not workers)
            _add_speeds(result, contest, f"{name}, {workers} workers")
    _switches(result, scale)
    return result


def _add_speeds(result: Result, contest: Contest, what: str) -> None:
    for name, costs in contest.costs.items():
        result.values.append(Value(f"{what}: {name}", Spread.of([1 / cost for cost in costs]), "samples/s"))
    result.aim(f"{what}: cost of a sample, runner / DataLoader", contest.ratio("runner", "DataLoader"), 1.0)


def _runner(name: str, samples: int, workers: int) -> float:
    data = DataContainer({"train": _dataset(name, samples, TensorDataset)}, BATCH, seed=0, num_workers=workers)
    data.open(data.new_counter(max_epochs=1))
    try:
        return _time(data.next_training_batch, samples)
    finally:
        data.close()


def _data_loader(name: str, samples: int, workers: int) -> float:
    dataset = _dataset(name, samples, TorchTensorDataset)
    loader: Iterator[Any] = iter(DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers))
    return _time(lambda: next(loader), samples)


def _dataset(name: str, samples: int, tensors: Callable[..., Any]) -> Any:
    if name == COSTLY:
        return Costly(samples)
    inputs, targets = torch.zeros(samples, 64), torch.zeros(samples, dtype=torch.int64)
    return tensors(inputs, targets, (10,)) if tensors is TensorDataset else tensors(inputs, targets)


def _time(take: Callable[[], Any], samples: int) -> float:
    """Take all batches but the first, with which workers start; return seconds per sample."""
    take()
    batches = samples // BATCH - 1
    start = perf_counter()
    for _ in range(batches):
        take()
    return (perf_counter() - start) / (batches * BATCH)


def _switches(result: Result, scale: Scale) -> None:
    """Evaluate after every epoch with two workers, and look at the batches around it."""
    epochs, train, test = scale.pick(12, 2), scale.pick(1_280, 192), scale.pick(640, 64)
    datasets = {"train": Costly(train), "test": Costly(test)}
    data = DataContainer(datasets, BATCH, seed=0, num_workers=2)
    counter = data.new_counter(max_epochs=epochs)
    data.open(counter, [Evaluation(Interval(every_n_epochs=1), "test")])
    try:
        waits, evaluations, firsts, workers = _train(data, counter)
    finally:
        data.close()
    per_batch = median(waits)
    result.add("a training batch with 2 workers", Spread.of(waits), "ms")
    result.add("the first training batch after an evaluation", Spread.of(firsts), "ms")
    per_evaluation_batch = Spread.of([seconds / -(-test // BATCH) for seconds in evaluations])
    result.add("a batch of an evaluation in between", per_evaluation_batch, "ms")
    ratio = Spread.of([first / per_batch for first in firsts])
    result.aim("first batch after an evaluation / a training batch", ratio, 1.5)
    result.notes.append(f"worker processes that were there: {len(workers)}, of 2; evaluations: {len(evaluations)}")


def _train(data: DataContainer, counter: UpdateCounter) -> tuple[list[float], list[float], list[float], set[int]]:
    waits, evaluations, firsts, workers = [], [], [], set()
    while not counter.is_finished:
        start = perf_counter()
        data.next_training_batch()
        is_first = counter.update > 0 and counter.is_full_epoch
        (firsts if is_first else waits).append(perf_counter() - start)
        counter.update += 1
        if counter.is_full_epoch:
            workers |= {child.pid for child in psutil.Process().children()}
            start = perf_counter()
            for _ in data.evaluation_batches("test"):
                pass
            evaluations.append(perf_counter() - start)
    return waits[1:], evaluations, firsts, workers
