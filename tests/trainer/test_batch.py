"""Batches of all kinds are counted and moved to a device."""

from collections import UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import by_hand
import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from callbacks.accuracy import Accuracy
from callbacks.loss import Loss
from callbacks.train_loss import TrainLoss
from ksuit_runner.data.batch_plan import EpochOrder
from ksuit_runner.data.container import DataContainer
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import KsuitError
from ksuit_runner.models.base import ModelBase
from ksuit_runner.schedule import constant
from ksuit_runner.tensors.device import to_device
from ksuit_runner.trainer.batch import batch_size
from ksuit_runner.trainer.sgd import SgdTrainer

Pair = namedtuple("Pair", "inputs targets")


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    task: str = "copy"
    made: int = field(default=0, init=False)

    def __post_init__(self):
        object.__setattr__(self, "made", self.made + 1)


class Encoding(UserDict):
    """Keeps something beside its entries, as tokenizers do."""

    def __init__(self, data=None, offsets=None):
        super().__init__(data)
        self.offsets = offsets


class Movable(Encoding):
    """Moves its entries by itself, as those of Hugging Face do, and is a mapping all the same."""

    def to(self, device):
        self.data = {key: value.to(device) if hasattr(value, "to") else value for key, value in self.data.items()}
        return self


@dataclass
class MovableRecord:
    x: torch.Tensor

    def to(self, device):
        return MovableRecord(self.x.to(device))


class Graphs:
    """A batch of its own kind, which knows how to be moved."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        return Graphs(self.x.to(device))


def images(*sizes):
    return [torch.zeros(3, size, size) for size in sizes]


X, Y = torch.arange(8.0).reshape(4, 2), torch.arange(4)


# Counting


@pytest.mark.parametrize(
    ("batch", "samples", "size"),
    [
        ({"step": torch.tensor(1.0), "text": "classification", "x": X}, None, 4),
        ({"points": torch.zeros(100, 2), "sample": torch.zeros(100), "y": Y}, None, 4),
        ({"mask": torch.ones(2, 2), "x": X}, None, 4),
        (Record(X), None, 4),
        (np.zeros((5, 2)), None, 5),
        ({"images": images(8, 8), "y": Y[:2]}, None, 2),
        ({"points": torch.zeros(100, 2), "edges": torch.zeros(300, 2)}, 4, 4),
        (pack_sequence([X, X]), 2, 2),
        (["a", "b", "c"], 3, 3),
        ({}, 3, 3),
        (None, 3, 3),
        ((X[:3], Y[:3]), 4, 3),  # one was dropped in collation
        ((images(3, 3, 3, 3), [Y[0], Y[1], Y[2], Y[3]]), 4, 4),  # images with 3 channels each
        ({"images": images(2, 2, 2, 2), "names": ["a", "b", "c", "d"]}, 4, 4),
        ((torch.zeros(8, 2), torch.zeros(8)), 4, 4),  # two views of each
    ],
)
def test_the_number_of_samples(batch, samples, size):
    assert batch_size(batch, samples) == size


@pytest.mark.parametrize(
    "batch", ["text", {}, None, images(8, 8, 8), (torch.zeros(4, 3), torch.zeros(3, 4)), torch.tensor(1)]
)
def test_a_batch_of_unknown_size_is_an_error_with_the_method_to_override(batch):
    with pytest.raises(KsuitError, match="Override `batch_size` of the trainer"):
        batch_size(batch)


# Moving, shown with torch's device without memory


@pytest.mark.parametrize(
    "batch",
    [
        X,
        {"a": [X]},
        Encoding({"a": X}),
        defaultdict(list, a=X),
        MappingProxyType({"a": X}),
        Record(X),
        Graphs(X),
        {"a": {"b": (Record(X), None, "text", 3)}},
        Pair(Graphs(X), [X]),
        pack_sequence([X, X]),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_all_tensors_are_moved_and_nothing_else_changes(batch):
    def tensors(value):
        if torch.is_tensor(value):
            return [value]
        if isinstance(value, (Graphs, Record)):
            return [value.x]
        if isinstance(value, torch.nn.utils.rnn.PackedSequence):
            return [value.data]
        items = value.values() if hasattr(value, "values") else value if isinstance(value, (list, tuple)) else ()
        return [tensor for item in items for tensor in tensors(item)]

    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
    assert {tensor.device.type for tensor in tensors(batch)} == {"cpu"}
    assert len(tensors(moved)) == len(tensors(batch)) > 0
    assert to_device(batch, torch.device("cpu")) is batch


def test_what_holds_no_tensor_is_not_copied():
    batch = {"names": ["a"], "size": torch.Size([1]), "more": Record("text")}
    assert to_device(batch, torch.device("meta")) is batch


# In a run


class Points:
    """Clouds of points of all samples in one tensor, which comes first; nothing shows the number of samples."""

    def __init__(self, length):
        self.y = torch.linspace(0, 3, length) ** 2

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.y[index]

    def collate_fn(self, samples):
        rows = 10 + 7 * len(samples)
        return Graphs({"points": torch.zeros(rows, 2), "mean": torch.stack(samples).mean()})


class Level(SgdTrainer):
    """Learns the mean of all samples."""

    def training_step(self, batch, model):
        return {"total": batch.x["mean"] + 0 * model(torch.ones(1, 1)).sum()}, None


@pytest.fixture
def level(maker, monkeypatch):
    """Makes runs with the number of samples only in what was fetched."""

    def run(callbacks, num_workers=0, trainer_class=Level):
        datasets = {"train": Points(10), "test": Points(11)}
        data = DataContainer(datasets, 4, seed=3, drop_last=False, num_workers=num_workers)
        model, optimizer = ModelBase(torch.nn.Linear(1, 1)), partial(torch.optim.SGD, lr=0.0)
        trainer = trainer_class(model, data, optimizer, constant, torch.nn.Identity(), max_epochs=1)
        monkeypatch.setattr(maker, "trainer", lambda: trainer)
        return maker.run(callbacks)

    return run


@pytest.mark.parametrize("num_workers", [0, 2])
def test_means_weigh_batches_by_the_samples_that_were_fetched_for_them(level, num_workers):
    callbacks = {
        "train": (TrainLoss, {"every_n_epochs": 1}),
        "test": (Loss, {"dataset_key": "test", "every_n_epochs": 1}),
    }
    run = level(callbacks, num_workers)
    train(run)
    for key in ("train", "test"):
        expected = run.data.datasets[key].y.mean().item()
        assert run.log_writer.summary[f"loss/{key}"].last == pytest.approx(expected, rel=1e-6)


class Weighing(Level):
    """Says itself what a batch weighs: its points."""

    def batch_size(self, batch):
        return len(batch.x["points"])


def test_means_weigh_batches_as_the_trainer_says(level):
    run = level({"train": (TrainLoss, {"every_n_epochs": 1})}, trainer_class=Weighing)
    train(run)
    order = EpochOrder(3, 1, 10).part(0, 10)
    means = [run.data.datasets["train"].y[order[start : start + 4]].mean().item() for start in (0, 4, 8)]
    expected = np.average(means, weights=[38, 38, 24])
    assert run.log_writer.summary["loss/train"].last == pytest.approx(expected, rel=1e-6)


class Named:
    """Samples by name."""

    def __init__(self, length):
        self.x, self.y = torch.randn(length, 4), torch.arange(length) % 3

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "name": str(index), "y": self.y[index]}


class ByName(SgdTrainer):
    def inputs_and_targets(self, batch):
        return batch["x"], batch["y"]


def test_batches_by_name_need_one_method_for_training_and_accuracy(maker):
    run = maker.run({"accuracy": (Accuracy, {"dataset_key": "test", "every_n_epochs": 1})}, max_epochs=1)
    run.data.datasets = {"train": Named(20), "test": Named(7)}
    with pytest.raises(KsuitError, match="a batch is a dict of 3 and not a pair.* Override `inputs_and_targets`"):
        train(run)
    run.trainer.__class__ = ByName
    train(run)
    data = run.data.datasets["test"]
    with torch.no_grad():
        expected = (run.trainer.model(data.x).argmax(1) == data.y).double().mean().item()
    assert run.log_writer.summary["accuracy/test"].last == pytest.approx(expected)


class Shared:
    """Samples beside a grid that they share; a batch has one of each dimension."""

    def __init__(self, length):
        self.inputs = torch.arange(3.0 * length).reshape(length, 3) / length

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index]

    def collate_fn(self, samples):
        return {"grid": torch.ones(64, 3), "mask": torch.eye(3), "task": "copy", "x": torch.stack(samples)}


class Masked(SgdTrainer):
    def training_step(self, batch, model):
        assert (len(batch["grid"]), len(batch["mask"]), batch["task"]) == (64, 3, "copy")
        return {"total": (model(batch["x"] @ batch["mask"]) + model(batch["grid"]).mean()).square().mean()}, None


def test_gradients_do_not_depend_on_accumulation_steps_with_shared_tensors():
    weights = []
    for steps in (1, 4):
        data = DataContainer({"train": Shared(22)}, 4, seed=3, drop_last=False)
        torch.manual_seed(0)
        model = ModelBase(torch.nn.Linear(3, 1))
        optimizer = partial(torch.optim.SGD, lr=0.1)
        trainer = Masked(
            model, data, optimizer, constant, torch.nn.Identity(), max_epochs=1, accumulation_steps=steps, device="cpu"
        )
        assert by_hand.train(trainer) == [4, 4, 4, 4, 4, 2]
        weights.append(by_hand.weights(trainer))
    torch.testing.assert_close(*weights)
