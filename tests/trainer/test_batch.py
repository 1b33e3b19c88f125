"""Batches of all kinds are counted, split and moved to a device."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
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
from ksuit_runner.trainer.batch import batch_size, split_batch
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


# Cutting


@pytest.mark.parametrize(
    "shared",
    ["classification", b"bytes", None, 5, 0.5, True, torch.tensor(2.0), np.float32(1), np.array(3), object(), range(4)],
    ids=lambda shared: type(shared).__name__,  # the text of an object differs between pytest's workers
)
def test_every_part_has_all_of_what_is_shared_by_all_samples(shared):
    parts = split_batch({"shared": shared, "nested": [{"again": shared}], "x": X, "y": Y}, 2)
    assert [part.batch["y"].tolist() for part in parts] == [[0, 1], [2, 3]]
    assert all(part.batch["shared"] is shared and part.batch["nested"][0]["again"] is shared for part in parts)


@pytest.mark.parametrize(
    ("shape", "samples"), [((64, 2), None), ((2, 2), None), ((5,), None), ((64, 2), 4), ((3,), 4), ((1, 4, 4), 4)]
)
def test_a_grid_or_mask_of_all_samples_is_not_cut(shape, samples):
    for batch in ({"x": X, "shared": torch.zeros(shape)}, {"shared": torch.zeros(shape), "x": X}):
        parts = split_batch(batch, 4, samples)
        assert [part.share for part in parts] == [0.25] * 4
        assert all(part.batch["shared"] is batch["shared"] and len(part.batch["x"]) == 1 for part in parts)


@pytest.mark.parametrize("kind", [dict, OrderedDict, Encoding, Movable, MappingProxyType, lambda d: Pair(**d)])
def test_containers_keep_their_kind(kind):
    batch = kind({"inputs": X, "targets": [Y, "text"]})
    for part in split_batch(batch, 2):
        assert type(part.batch) is type(batch)
        inputs, targets = part.batch if isinstance(batch, Pair) else part.batch.values()
        assert inputs.shape == (2, 2) and len(targets[0]) == 2 and targets[1] == "text"


def test_dataclasses_and_other_attributes_of_a_container_are_copied():
    record, encoding, counts = Record(X), Encoding({"x": X}, offsets=[1, 2, 3]), defaultdict(list, x=X)
    assert [part.batch.x.shape for part in split_batch(MovableRecord(X), 2)] == [(2, 2)] * 2
    first = split_batch({"record": record, "encoding": encoding, "counts": counts}, 2)[0].batch
    assert (first["record"].x.shape, first["record"].task, first["record"].made) == ((2, 2), "copy", 1)
    assert (first["encoding"]["x"].shape, first["encoding"].offsets) == ((2, 2), [1, 2, 3])
    assert first["counts"]["missing"] == []
    assert record.x is X and encoding["x"] is X, "the batch itself stays as it is"


@pytest.mark.parametrize("samples", [None, 3])
def test_a_list_with_one_item_per_sample_is_cut_as_a_list(samples):
    """Images of three channels in a batch of another size, boxes, names, ragged tokens, optional values."""
    batch = {
        "images": tuple(images(5, 6, 7, 8)),
        "boxes": [{"box": torch.zeros(count, 4)} for count in (1, 4, 0, 2)],
        "names": list("abcd"),
        "tokens": [torch.arange(n) for n in (3, 1, 4, 2)],
        "masks": [None, X, None, Y.float().reshape(2, 2)],
        "y": Y,
    }
    first, second = (part.batch for part in split_batch(batch, 2, samples and 4))
    assert [image.shape[1] for image in (*first["images"], *second["images"])] == [5, 6, 7, 8]
    assert type(first["images"]) is tuple
    assert [len(boxes["box"]) for boxes in second["boxes"]] == [0, 2]
    assert first["names"] == ["a", "b"] and second["masks"][0] is None
    assert [len(tokens) for tokens in second["tokens"]] == [4, 2]


def test_inputs_and_targets_are_a_pair_also_of_two_samples(bits):
    for pair in ([X[:2], X[2:]], (images(4, 5), ["a", "b"]), Pair(X[:2], Y[:2])):
        for row, part in enumerate(split_batch(pair, 2, 2)):
            assert type(part.batch) is type(pair)
            for whole, rows in zip(pair, part.batch, strict=True):
                assert len(rows) == 1 and bits(rows[0]) == bits(whole[row])


@pytest.mark.parametrize(
    ("batch", "samples", "reason"),
    [
        ({"images": images(8, 8, 8), "y": Y[:3]}, 3, "a list of 3 in the batch is ambiguous: 3 samples"),
        ((["a", "b", "c"], ["d", "e", "f"], ["g", "h", "i"]), 3, "a list of 3 in the batch is ambiguous: 3 samples"),
        ({"x": X, "graphs": Graphs(X)}, 4, "a Graphs, which cannot be cut"),
        (pack_sequence([X, X]), 2, "a PackedSequence, which cannot be cut"),
        ({"points": torch.zeros(100, 2)}, 4, "nothing in the batch has one entry for each of its 4 samples"),
        ("text", 4, "nothing in the batch has one entry for each of its 4 samples"),
        (X.to_sparse(), 4, r"a tensor that cannot be cut \(torch.sparse_coo\)"),
        (torch.nested.nested_tensor([X, X], layout=torch.jagged), 2, r"a tensor that cannot be cut \(nested\)"),
    ],
)
def test_what_cannot_be_cut_or_is_ambiguous_is_an_error_with_the_method_to_override(batch, samples, reason):
    with pytest.raises(KsuitError, match=f"trainer.accumulation_steps: .*{reason}.* Override `split` of the trainer"):
        split_batch(batch, 2, samples)
    assert split_batch(batch, 1, samples) == ((batch, 1.0),)


def test_a_batch_smaller_than_the_number_of_parts():
    assert [(part.batch.tolist(), part.share) for part in split_batch(Y[:2], 5)] == [([0], 0.5), ([1], 0.5)]
    assert [part.share for part in split_batch({"x": torch.zeros(0, 3)}, 4)] == [1.0]


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


def test_gradients_do_not_depend_on_accumulation_steps_with_shared_tensors(caplog):
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
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2
    assert "batch['grid'] has 64 rows and the batch 4 samples" in warned[0] and "batch['mask'] has 3 rows" in warned[1]
