from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from callbacks.accuracy import Accuracy
from callbacks.batchnorm_statistics import BatchnormStatistics
from callbacks.ema import Ema
from callbacks.loss import Loss

STATISTICS = partial(BatchnormStatistics, dataset_key="train", every_n_updates=4)


def new_module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10), nn.BatchNorm1d(10))


def train(new_run, run_id, callbacks, **kwargs):
    return new_run(callbacks, run_id, module=new_module(), max_updates=8, **kwargs).train()


def test_they_are_those_of_torch_and_what_evaluates_later_sees_them(new_run, digits):
    # Loss reads the same data at the same update: sharing the pass, it would see statistics of a part of the batches.
    callbacks = {"ema": Ema, "statistics": STATISTICS, "loss": partial(Loss, dataset_key="train", every_n_updates=4)}
    run = train(new_run, "whole", callbacks)
    average, live = run["ema"].models["ema"], run.model
    expected = average.copy()
    update_bn(digits["train"].inputs.split(100), expected)
    for name, buffer in expected.eval().named_buffers():
        torch.testing.assert_close(average.get_buffer(name), buffer)
        assert not torch.equal(buffer, live.get_buffer(name))
    outputs, targets = expected(digits["train"].inputs), digits["train"].targets
    assert run.metric("loss/train/ema")[8] == pytest.approx(nn.functional.cross_entropy(outputs, targets).item(), 1e-5)
    assert not any(module.training for module in average.modules())


def test_a_resumed_run_has_the_same_values_and_training_is_unchanged(new_run):
    evaluated = {
        "ema": Ema,
        "statistics": STATISTICS,
        "accuracy": partial(Accuracy, dataset_key="test", every_n_updates=2),
    }
    whole = train(new_run, "whole", evaluated)
    train(new_run, "cut", evaluated, stop_at=4)
    resumed = train(new_run, "cut", evaluated)
    assert resumed.metric("accuracy/test/ema") == whole.metric("accuracy/test/ema")
    alone = train(new_run, "alone", {})
    assert all(torch.equal(alone.weights[name], weight) for name, weight in whole.weights.items())
