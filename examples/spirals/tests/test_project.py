"""What the project adds to a run: the network learns, a resumed run is the same, and the callback changes nothing."""

from functools import partial

import torch
from spirals import Network, Spirals

from callbacks.confidence import Confidence
from ksuit_runner.testing import tiny_run

CONFIDENCE = {"confidence": partial(Confidence, dataset_key="validation", every_n_updates=10)}


def run(folder, run_id, callbacks, **kwargs):
    """Train a small network for 60 updates, or up to ``stop_at``; a run of that id which was stopped is resumed."""
    torch.manual_seed(0)
    network = Network((2,), (3,), width=16)
    datasets = {key: Spirals(key) for key in ("train", "validation")}
    return tiny_run(folder, callbacks, run_id, datasets=datasets, module=network, max_updates=60, **kwargs).train()


def test_a_resumed_run_is_the_same(tmp_path):
    """It ends with the same weights and the same metrics, to the last bit."""
    whole = run(tmp_path, "whole", CONFIDENCE)
    run(tmp_path, "stopped", CONFIDENCE, stop_at=25)
    resumed = run(tmp_path, "stopped", CONFIDENCE)
    assert list(whole.metric("confidence/validation")) == [10, 20, 30, 40, 50, 60]
    assert resumed.metric("confidence/validation") == whole.metric("confidence/validation")
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())


def test_the_network_learns_and_the_callback_changes_nothing(tmp_path):
    """Half of the validation points are told right, where guessing has a third, with the callback and without."""
    watched, alone = run(tmp_path, "watched", CONFIDENCE), run(tmp_path, "alone", {})
    assert all(torch.equal(alone.weights[name], weight) for name, weight in watched.weights.items())
    points = Spirals("validation")
    predicted = alone.model.module(points.inputs).argmax(dim=1)
    assert (predicted == points.targets).float().mean() > 0.5
