from functools import partial

import pytest
import torch

from callbacks.weight_norms import WeightNorms
from ksuit_runner.models.cnn import Cnn


def test_the_norms_are_those_of_the_weights_of_each_module(new_run):
    callbacks = {"norms": partial(WeightNorms, match=["stages.{}"], every_n_updates=3)}
    run = new_run(callbacks, module=Cnn((1, 8, 8), (10,), channels=(4, 4)), max_updates=3).train()
    for stage in ("stages.0", "stages.1"):
        own = [weight.flatten() for name, weight in run.weights.items() if name.startswith(f"{stage}.")]
        assert run.metric(f"weight_norms/{stage}") == {3: pytest.approx(torch.cat(own).norm().item(), rel=1e-6)}
    assert run.metrics() == {"weight_norms", "weight_norms/stages.0", "weight_norms/stages.1"}
