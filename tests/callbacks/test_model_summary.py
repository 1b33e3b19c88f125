import json
import logging
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from callbacks.model_summary import ModelSummary
from ksuit_runner.errors import ConfigError
from ksuit_runner.trainer.sgd import SgdTrainer


def summary_of(run):
    (path,) = run.paths.artifacts_dir.glob("tables/model_summary/*.json")
    table = json.loads(path.read_text())
    return {row[0]: dict(zip(table["columns"][1:], row[1:], strict=True)) for row in table["data"]}


def network():
    block = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2))
    block[1].requires_grad_(False)
    return nn.Sequential(block, nn.Flatten(), nn.Linear(128, 10))


def test_each_module_has_its_shape_its_parameters_and_its_operations(new_run, caplog):
    caplog.set_level(logging.INFO, "ksuit_runner")
    run = new_run({"summary": partial(ModelSummary, prints=True)}, module=network(), max_updates=1).train()
    convolution = {"type": "Conv2d", "output": "(72, 2, 8, 8)", "trained": 18, "frozen": 0, "flops": 2 * 128 * 9}
    norm = {"type": "BatchNorm2d", "output": "(72, 2, 8, 8)", "trained": 0, "frozen": 4, "flops": 0}
    linear = {"type": "Linear", "output": "(72, 10)", "trained": 1290, "frozen": 0, "flops": 2 * 1280}
    found = summary_of(run)
    assert list(found) == ["", "0", "0.0", "0.1", "1", "2"]
    assert (found["0.0"], found["0.1"], found["2"]) == (convolution, norm, linear)
    assert found["0"] == {**convolution, "type": "Sequential", "frozen": 4}
    assert found[""]["flops"] == 2 * 128 * 9 + 2 * 1280 and found[""]["trained"] == 1308
    assert "BatchNorm2d (72, 2, 8, 8)" in caplog.text
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())


def test_levels_below_the_depth_are_left_out(new_run):
    run = new_run({"summary": partial(ModelSummary, depth=1)}, module=network(), max_updates=1).train()
    assert list(summary_of(run)) == ["", "0", "1", "2"]
    with pytest.raises(ConfigError, match="depth: a whole number of at least 0 is needed, not -1"):
        new_run({"summary": partial(ModelSummary, depth=-1)})


def test_a_model_with_inputs_that_only_its_trainer_knows_has_no_shapes(new_run, caplog):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, left, right):
            return self.layer(left + right)

    class OfPairs(SgdTrainer):
        def training_step(self, batch, model):
            inputs, targets = batch
            outputs = model(inputs.flatten(1), inputs.flatten(1))
            return self.loss(outputs, targets), outputs

    options = {"module": Pair(), "trainer_class": OfPairs, "max_updates": 1}
    found = summary_of(new_run({"summary": ModelSummary}, **options).train())
    assert found["layer"] == {"type": "Linear", "output": None, "trained": 650, "frozen": 0, "flops": None}
    assert "the summary lacks shapes and operations: TypeError" in caplog.text


class Stream(IterableDataset):
    """Samples without an end."""

    def __iter__(self):
        while True:
            yield torch.rand(2), torch.zeros((), dtype=torch.long)


class StreamWithState(Stream):
    """Would have moved on if samples were read in advance."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(("stream", "output"), [(Stream, "(4, 3)"), (StreamWithState, None)])
def test_a_stream_is_summed_up_by_its_first_samples_or_without_shapes(new_run, caplog, stream, output):
    options = {"datasets": {"train": stream()}, "module": nn.Linear(2, 3), "batch_size": 4, "max_updates": 1}
    found = summary_of(new_run({"summary": ModelSummary}, **options).train())
    assert found[""]["output"] == output and found[""]["trained"] == 9
    assert ("cannot be read without moving it on" in caplog.text) == (output is None)
