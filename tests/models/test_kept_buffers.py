"""Buffers that a module changes in evaluation mode: callbacks that evaluate change no bit of training."""

import pickle
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver

from callbacks.ema import Ema
from callbacks.loss import Loss
from ksuit_runner import PeriodicCallback
from ksuit_runner.models.base import ModelBase
from ksuit_runner.testing import tiny_run
from ksuit_runner.trainer.sgd import SgdTrainer


class Observing(nn.Linear):
    """Counts, averages and quantizes in whatever mode it is."""

    def __init__(self):
        super().__init__(64, 10)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("sizes", torch.zeros(0), persistent=False)
        self.quantize = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        self.fused = FusedMovingAvgObsFakeQuantize()  # its kernel counts no change
        both = torch.zeros(4)
        self.register_buffer("left", both[:2])
        self.register_buffer("right", both[2:])

    def forward(self, inputs):
        self.calls += 1
        self.mean = self.mean.lerp(inputs.mean(), 0.1)
        self.sizes.resize_(self.calls.item() % 4).fill_(len(inputs))
        self.left += 1
        self.right.add_(inputs.mean())
        scale = 1 + self.mean + self.sizes.sum() / 1000 + self.calls % 3 + self.right.sum()
        return super().forward(self.fused(self.quantize(inputs.flatten(1)) * scale))


class Direct(PeriodicCallback):
    """Computes with the model in a hook, beside all evaluations."""

    def _track_after_update_step(self, update_counter):
        self.model(torch.randn(5, 1, 8, 8))

    def _periodic_callback(self, update_counter):
        self.trainer.predict(torch.randn(3, 1, 8, 8))


class Centered(nn.CrossEntropyLoss):
    """Follows its outputs in whatever mode it is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(10))

    def forward(self, outputs, targets):
        self.center.lerp_(outputs.detach().mean(0), 0.1)
        return super().forward(outputs - self.center, targets)


class InPieces(SgdTrainer):
    """Calls the wrapped module, and not the model."""

    def training_step(self, batch, model):
        outputs = model.module(batch[0])
        return {"total": self.loss(outputs, batch[1])}, outputs


EVALUATES = {
    "before": partial(Direct, every_n_updates=3),
    "loss": partial(Loss, dataset_key="test", every_n_updates=2),
    "ema": partial(Ema, average_buffers=True),
    "direct": partial(Direct, every_n_updates=3),
}


@pytest.mark.parametrize(("parts", "trainer_class"), [(1, SgdTrainer), (2, SgdTrainer), (2, InPieces)])
def test_evaluations_change_no_bit_of_training_and_a_resume_is_exact(tmp_path, parts, trainer_class):
    def run(name, callbacks, **kwargs):
        torch.manual_seed(0)
        given = {"module": Observing(), "loss": Centered(), "accumulation_steps": parts, "max_updates": 9, **kwargs}
        given["trainer_class"] = trainer_class
        return tiny_run(tmp_path, callbacks, name, **given).train()

    def state(found):
        return {**found.weights, "center": found.run.trainer.loss.center}

    alone, whole = run("alone", {}), run("whole", EVALUATES)
    assert alone.weights["calls"] == 9 * parts
    for name, tensor in state(alone).items():
        assert torch.equal(tensor, state(whole)[name]), name
    run("stopped", EVALUATES, stop_at=5)
    resumed = run("stopped", EVALUATES)
    for name, tensor in state(whole).items():
        assert torch.equal(tensor, state(resumed)[name]), name
    other = run("other", {name: EVALUATES[name] for name in ("loss", "ema")})
    for key in whole.metrics():
        assert resumed.metric(key) == whole.metric(key)
        assert key.startswith("direct") or other.metric(key) == whole.metric(key), key
    unseen = run("unseen", {"ema": EVALUATES["ema"]})
    averages = [found.run.trainer.evaluation_models["ema"].tensors() for found in (whole, unseen)]
    for name in averages[0]:
        if not name.startswith(("fused.", "quantize.")):  # which begin with infinity, and have no average
            assert torch.equal(averages[0][name], averages[1][name]), name


def watched(module):
    model = ModelBase(module).eval()
    model.kept_buffers.is_used = True
    return model


@pytest.mark.parametrize("name", ["calls", "mean", "sizes", "left", "right", "quantize.scale", "fused.scale"])
def test_what_is_put_back(name):
    torch.manual_seed(0)
    model = watched(Observing())
    *path, name = name.split(".")
    holder = model.module.get_submodule(".".join(path))
    for _ in range(2):
        before = {key: value.clone() for key, value in holder.named_buffers()}[name]
        model(torch.randn(4, 64))
        model(torch.randn(4, 64))
        assert not torch.equal(getattr(holder, name), before)
        copy = deepcopy(model)
        model.kept_buffers.put_back()
        copy.kept_buffers.put_back()  # it has kept nothing
        assert torch.equal(getattr(holder, name), before)
        assert not torch.equal(copy.module.get_buffer("quantize.scale"), model.module.get_buffer("quantize.scale"))
        model.train()(torch.randn(4, 64))  # an update in between
        model.kept_buffers.put_back()
        assert not torch.equal(getattr(holder, name), before)
        model.eval()


def test_a_model_that_only_updates_compute_with_keeps_what_it_has_changed():
    teacher = watched(Observing()).copy()
    for count in (1, 2):
        teacher(torch.randn(4, 64))
        assert teacher.tensors()["calls"] == count


def test_inference_mode_and_pickles():
    model = watched(Observing())
    with torch.inference_mode():
        model(torch.randn(4, 64))
        model(torch.randn(4, 64))
    assert model.module.mean.is_inference()
    copy = pickle.loads(pickle.dumps(model))
    model.kept_buffers.put_back()
    assert model.module.mean == 0
    assert not model.module.mean.is_inference()
    copy.kept_buffers.put_back()
    assert copy.module.calls == 2


class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.norm, self.length = nn.BatchNorm1d(3), 2

    def forward(self, inputs):
        if len(inputs) > self.length:
            self.cache, self.length = torch.zeros(len(inputs)), len(inputs)
        return self.norm(inputs) + self.cache[: len(inputs), None]


class FilledOnce(nn.Module):
    """Fills a buffer of another module when it is first called, and notes that it has."""

    def __init__(self):
        super().__init__()
        self.shift, self.is_filled = nn.Module(), False
        self.shift.register_buffer("mean", torch.zeros(3))

    def forward(self, inputs):
        if not self.is_filled:
            self.shift.mean.copy_(inputs.mean(0))
            self.is_filled = True
        return inputs - self.shift.mean


def test_what_stays():
    model = watched(Caching())
    model(torch.randn(5, 3))
    model.kept_buffers.put_back()
    assert len(model.module.cache) == 5  # the module counts on it
    model.module.norm.train()  # as when running statistics are found anew
    model(torch.randn(5, 3))
    model.kept_buffers.put_back()
    assert model.module.norm.num_batches_tracked == 1
    filled = watched(FilledOnce())
    filled(torch.ones(5, 3))
    filled.kept_buffers.put_back()
    assert torch.equal(filled.module.shift.mean, torch.ones(3))  # the module does not fill it again
    observing = watched(Observing())
    observing(torch.randn(4, 64))
    observing.module.calls.fill_(70)  # by a callback that means to
    observing.kept_buffers.put_back()
    assert observing.module.calls == 70
    observing(torch.randn(4, 64))
    observing.kept_buffers.put_back()
    assert observing.module.calls == 70
