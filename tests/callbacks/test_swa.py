from functools import partial

import pytest
import torch
from test_ema import Recorder

from callbacks.accuracy import Accuracy
from callbacks.swa import Swa
from ksuit_runner.errors import ConfigError

SWA = partial(Swa, start_update=3, every_n_updates=2)


def test_it_is_the_mean_of_the_weights_since_its_start(new_run):
    run = new_run({"swa": SWA, "recorder": Recorder}, max_updates=10).train()
    history = [weights["layer.weight"] for weights in run["recorder"].history]
    average = run["swa"].models["swa"].module.layer.weight
    torch.testing.assert_close(average, torch.stack([history[n] for n in (3, 4, 6, 8, 10)]).mean(0))


def test_it_is_the_mean_of_the_ends_of_epochs(new_run):
    swa = partial(Swa, start_epoch=1, every_n_epochs=1)
    run = new_run({"swa": swa, "recorder": Recorder}).train()
    history = [weights["layer.weight"] for weights in run["recorder"].history]
    average = run["swa"].models["swa"].module.layer.weight
    torch.testing.assert_close(average, torch.stack(history[20:61:20]).mean(0))


def test_a_resumed_run_has_the_same_values_and_training_is_unchanged(new_run):
    callbacks = {"swa": SWA, "accuracy": partial(Accuracy, dataset_key="test", every_n_updates=1)}
    whole = new_run(callbacks, "whole", max_updates=10).train()
    for stop_at in (2, 6):
        new_run(callbacks, f"cut{stop_at}", max_updates=10, stop_at=stop_at).train()
        resumed = new_run(callbacks, f"cut{stop_at}", max_updates=10).train()
        assert resumed.metric("accuracy/test/swa") == whole.metric("accuracy/test/swa")
    alone = new_run({}, "alone", max_updates=10).train()
    assert torch.equal(alone.weights["layer.weight"], whole.weights["layer.weight"])


def test_a_start_before_the_first_update_is_refused(new_run):
    with pytest.raises(ConfigError, match="start_epoch: a whole number of at least 0 is needed, not -1"):
        new_run({"swa": partial(Swa, start_epoch=-1)})
