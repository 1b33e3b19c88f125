"""Tensors keep their memory layout, by which torch chooses kernels."""

from functools import partial

import pytest
import torch
from by_hand import WHOLE
from torch import nn

from callbacks.ema import Ema
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import train
from ksuit_runner.engine.restore import restore
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.origin import Origin
from ksuit_runner.tensors.layout import lay_out, lay_out_channels_last, row_major, unusual_strides, write
from ksuit_runner.trainer.build_optimizer import build_optimizer
from ksuit_runner.trainer.optimizer_state import load_optimizer_state, optimizer_state

LAST = torch.channels_last
TENSORS = {
    "row-major": torch.rand(2, 3),
    "scalar": torch.rand(()),
    "empty": torch.rand(0, 3),
    "channels last": torch.rand(2, 3, 4, 5).to(memory_format=LAST),
    "channels last of one channel": torch.rand(2, 1, 4, 5).to(memory_format=LAST),
    "transposed": torch.rand(3, 4).T,
    "permuted": torch.rand(2, 3, 4).permute(2, 0, 1),
    "with gaps": torch.rand(3, 4)[:, :2],
    "expanded": torch.rand(3, 1).expand(3, 4),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_laid_out_again_with_its_values(name):
    tensor = TENSORS[name]
    strides = unusual_strides([("x", tensor)])
    assert strides == ({} if tensor.stride() == row_major(tensor.shape) else {"x": tensor.stride()})
    found = torch.empty(tensor.shape).copy_(tensor)
    lay_out([("x", found)], strides)
    assert found.stride() == tensor.stride() and found.equal(tensor)
    lay_out([("x", found)], {})
    assert found.stride() == row_major(tensor.shape) and found.equal(tensor)


def test_values_are_written_into_an_expanded_tensor():
    assert write(torch.zeros(3, 1).expand(3, 4), TENSORS["expanded"]).equal(TENSORS["expanded"])


class Images(nn.Module):
    """Convolutions, a weight that lies transposed, and a mask that is a view of one number."""

    def __init__(self, layout):
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(1, 4, 2, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 2))
        self.head = nn.Parameter(torch.randn(3, 16).T.contiguous().T if layout == "row-major" else torch.randn(16, 3).T)
        self.register_buffer("mask", torch.ones(1).expand(16))
        if layout == "channels last":
            self.to(memory_format=LAST)

    def forward(self, x):
        return (self.convolutions(x.view(-1, 1, 2, 2)).flatten(1) * self.mask) @ self.head.T


class Turns(CallbackBase):
    """Changes the layout of the model in the middle of training."""

    def _after_update(self, update_counter):
        if update_counter.update == 2:
            self.model.to(memory_format=LAST)


def images(layout):
    torch.manual_seed(0)
    return Images(layout)


def strides(model):
    return {name: value.stride() for name, value in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("update", [2, 4])
@pytest.mark.parametrize(
    ("layout", "callbacks"), [("channels last", {}), ("row-major", {"turns": (Turns, {})})], ids=["built", "changed"]
)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)], ids=["adamw", "sgd"])
def test_a_resumed_run_has_the_layouts_and_bits_of_the_uninterrupted_one(maker, layout, callbacks, update, optimizer):
    callbacks = {**callbacks, "ema": (Ema, {"decays": [0.5]})}
    options = {"max_updates": 6, "checkpoint": {"every_n_updates": 2, "keep_last": 9}}
    options["optimizer"] = partial(optimizer, lr=0.01)
    whole = maker.run(callbacks, model=images(layout), **options)
    train(whole)
    resumed = maker.resumed(callbacks, update=update, model=images(layout), **options)
    train(resumed)
    found = [strides(run.trainer.model) for run in (whole, resumed)]
    averages = [strides(run.hooks.callbacks["ema"].models["ema"]) for run in (whole, resumed)]
    assert found[0] == found[1] and averages[0] == averages[1]
    assert not whole.trainer.model.module.convolutions[2].weight.is_contiguous()
    assert whole.trainer.model.module.mask.stride() == (0,)
    folders = [read_newest(maker.paths(run_id)).paths.checkpoint_dir for run_id in ("run00000", "run00000-resumed")]
    for file in ("model.safetensors", "ema.safetensors", "trainer.safetensors", "trainer.json"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


@pytest.mark.parametrize("cls", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)], ids=["adam", "sgd"])
def test_fused_kernels_pair_the_right_elements_when_the_layout_has_changed(maker, cls):
    """They go through memory from end to end; kernels that look at strides say what is right."""
    results = []
    for fused in (True, False):
        trainer = maker.trainer(model=images("row-major"), optimizer=partial(cls, lr=0.01, fused=fused))
        for step in range(6):
            if step == 3:
                trainer.model.to(memory_format=LAST)
            inputs = torch.rand(8, 4, generator=torch.Generator().manual_seed(step))
            trainer.update.backward(trainer.forward((inputs, torch.arange(8) % 3))[0], WHOLE)
            trainer.step()
        results.append(trainer.model.tensors())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-6)


def test_a_trainer_lays_convolutions_out_with_channels_last(maker):
    """A fork may choose the other layout; a resume keeps that of its checkpoint."""
    runs = {name: partial(maker.run, run_id=name, optimizer=partial(torch.optim.AdamW, lr=0.01)) for name in "ab"}
    first = runs["a"](model=images("row-major"), channels_last=True, max_updates=2)
    weight = first.trainer.model.module.convolutions[2].weight
    assert weight.is_contiguous(memory_format=LAST) and not weight.is_contiguous()
    train(first)
    first.checkpoint_writer.wait()
    checkpoint = read_newest(maker.paths("a"))
    for mode, changes, is_last in ((Mode.RESUME, (), True), (Mode.FORK, ("trainer.channels_last",), False)):
        second = runs["b"](model=images("row-major"), channels_last=is_last, max_updates=4)
        restore(second, checkpoint, Origin(mode, "a", changes), strict=True)
        again = second.trainer.model.module.convolutions[2].weight
        assert again.is_contiguous(memory_format=LAST) is is_last
        assert again.equal(weight)
        train(second)


def test_tensors_of_other_dimensions_are_not_touched_by_channels_last():
    module = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Conv3d(2, 3, 2), nn.Linear(3, 4))
    before = [(tensor.data_ptr(), tensor.stride()) for tensor in module.parameters()]
    lay_out_channels_last(module)
    changed = [
        (tensor.data_ptr(), tensor.stride()) != known for tensor, known in zip(module.parameters(), before, strict=True)
    ]
    assert changed == [False, False, True, False, False, False]
    assert module[1].weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_state_that_was_stored_without_its_layout_is_laid_out_for_fused_kernels():
    model = nn.Conv2d(3, 4, 2).to(memory_format=LAST)
    optimizer = build_optimizer(partial(torch.optim.AdamW, lr=0.1), model, {}, torch.device("cpu"))
    model(torch.rand(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    state = optimizer_state(optimizer)
    wanted = state["parameters"]["weight"]["exp_avg"].clone()
    state["parameters"]["weight"]["exp_avg"] = wanted.contiguous()
    load_optimizer_state(optimizer, state)
    found = optimizer.state[model.weight]["exp_avg"]
    assert found.stride() == model.weight.stride() and found.equal(wanted)


def test_parameters_with_gaps_in_memory_get_no_fused_kernels():
    model = nn.Module()
    model.weight = nn.Parameter(torch.rand(3, 4)[:, :2])
    optimizer = build_optimizer(partial(torch.optim.AdamW, lr=0.1), model, {}, torch.device("cpu"))
    assert not optimizer.param_groups[0]["fused"]
