"""Whatever a forward pass does to buffers can be rolled back."""

import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig

from ksuit_runner.errors import CheckpointError
from ksuit_runner.testing import tiny_run
from ksuit_runner.trainer import buffer_snapshot
from ksuit_runner.trainer.buffer_snapshot import BufferSnapshot


class Holder(nn.Module):
    """Has buffers of all kinds, below the top as well."""

    def __init__(self):
        super().__init__()
        self.below = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
        self.register_buffer("value", torch.arange(3.0))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_buffer("none", None)
        self.register_buffer("wide", torch.zeros(1).expand(4))
        self.register_buffer("sparse", torch.eye(2).to_sparse())


def assign(module):
    module.value = module.value + 1


def write_behind(module):
    module.value.data += 1


def point_elsewhere(module):
    module.value.data = torch.zeros(3)


def change_shape(module):
    module.value = torch.zeros(5)


def change_shape_in_place(module):
    module.value.resize_(5).zero_()


def fill_none(module):
    module.none = torch.ones(1)


def empty(module):
    module.value = None


def add(module):
    module.register_buffer("late", torch.ones(1))


def remove(module):
    del module.value


def attach_a_graph(module):
    module.value = module.value * module.below[1].weight.sum()


def normalize(module):
    module.below[0](torch.rand(4, 2))


def change_the_rest(module):
    module.passing.add_(1)
    module.wide = module.wide + 1
    module.sparse.mul_(2)


CHANGES = [
    *(assign, write_behind, point_elsewhere, change_shape, change_shape_in_place, fill_none, empty, add, remove),
    *(attach_a_graph, normalize, change_the_rest),
]


def found(module):
    return {
        name: None if value is None else value.detach().to_dense().clone()
        for below, item in module.named_modules()
        for name, value in ((f"{below}.{key}", value) for key, value in item._buffers.items())
    }


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("large", [buffer_snapshot.LARGE, 0], ids=["small", "large"])
def test_a_change_since_the_snapshot_is_rolled_back_and_one_before_it_is_not(bits, change, large, monkeypatch):
    monkeypatch.setattr(buffer_snapshot, "LARGE", large)
    module = Holder()
    snapshot = BufferSnapshot(module)
    for _ in range(3):
        snapshot.take()
        before = found(module)
        change(module)
        if change is write_behind and not large:
            with pytest.raises(CheckpointError, match="the buffer 'value' is changed through .data"):
                snapshot.restore()
            return
        snapshot.restore()
        assert bits(found(module)) == bits(before)
        assign(module)
        normalize(module)


def test_a_module_that_was_replaced_is_in_the_next_snapshot(bits):
    module = Holder()
    snapshot = BufferSnapshot(module)
    snapshot.take()
    module.below[0] = nn.BatchNorm1d(2, momentum=0.5)
    normalize(module)
    snapshot.take()
    before = found(module)
    normalize(module)
    snapshot.restore()
    assert bits(found(module)) == bits(before)


def test_a_large_buffer_is_copied_when_it_changes_only(monkeypatch):
    monkeypatch.setattr(buffer_snapshot, "LARGE", 8)
    module = nn.Module()
    module.register_buffer("mask", torch.full((4,), float("nan")))
    snapshot = BufferSnapshot(module)
    copies = []
    for _ in range(3):
        snapshot.take()
        copies.append(snapshot._copies[0].copy)
    assert copies[0] is copies[2]
    snapshot.restore()
    module.mask.zero_()
    snapshot.take()
    assert snapshot._copies[0].copy.tolist() == [0] * 4


@pytest.mark.parametrize("size", [0, 1])
def test_a_buffer_that_a_part_has_given_another_size_is_reset_for_the_next_part(size):
    module = nn.BatchNorm1d(2)
    module.register_buffer("lowest", torch.zeros(size))
    snapshot = BufferSnapshot(module)
    for _ in range(2):
        snapshot.take()
        before = found(module)
        for _ in range(3):
            module.lowest.resize_(4).fill_(1)
            module(torch.rand(4, 2))
            snapshot.reset()
            assert {name: item.tolist() for name, item in found(module).items()} == {
                name: item.tolist() for name, item in before.items()
            }


def test_the_observers_of_a_channel_compute_in_parts(tmp_path):
    class Observed(nn.Linear):
        def __init__(self):
            super().__init__(64, 10)
            self.observe = get_default_qat_qconfig("x86").weight()  # its buffers get their size at the first call

        def forward(self, inputs):
            return nn.functional.linear(inputs.flatten(1), self.observe(self.weight), self.bias)

    found = tiny_run(tmp_path, {}, module=Observed(), accumulation_steps=2, max_updates=3).train()
    assert found.weights["observe.scale"].shape == (10,)
