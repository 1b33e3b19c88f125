"""Tests for activation checkpointing: the same results to the bit, with fewer tensors kept."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from ksuit_runner.engine.loop import train
from ksuit_runner.errors import ConfigError
from ksuit_runner.trainer.activations import checkpoint_activations


def make():
    torch.manual_seed(0)
    blocks = nn.ModuleList(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.GELU()) for _ in range(2)
    )
    return nn.ModuleDict({"blocks": blocks, "head": nn.Linear(4, 1)})


def computed(model):
    kept = []
    torch.manual_seed(3)
    hidden = torch.randn(6, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda item: kept.append(item.shape) or item, lambda item: item):
        for block in model["blocks"]:
            hidden = block(hidden)
        loss = model["head"](hidden).square().sum()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return len(kept), [loss.detach(), *gradients, *(item.clone() for item in model.buffers()), torch.rand(3)]


def test_gradients_buffers_and_draws_are_the_same_and_less_is_kept():
    plain, checkpointed = make(), make()
    checkpoint_activations(checkpointed, ["blocks.{}"])
    changed = [name for name, item in checkpointed.named_modules() if "forward" in vars(item)]
    assert changed == ["blocks.0", "blocks.1"]  # and nothing in them a second time
    copy = deepcopy(checkpointed)
    most, expected = computed(plain)
    for model in (checkpointed, copy):
        kept, found = computed(model)
        assert kept < most
        assert all(map(torch.equal, found, expected))
    copy["blocks"][0][0].weight.data.zero_()
    assert not torch.equal(computed(copy)[1][0], computed(checkpointed)[1][0])  # a copy computes with its own weights


def test_a_pattern_that_matches_nothing_is_named():
    with pytest.raises(ConfigError, match=r"'block.{}' matches no module. Did you mean 'blocks") as error:
        checkpoint_activations(make(), ["block.{}"])
    assert error.value.path == "trainer.activation_checkpointing"


def test_a_run_is_the_same_with_it(maker, bits):
    weights = []
    for run_id, patterns in (("plain", None), ("checkpointed", ["0", "2"])):
        run = maker.run(run_id=run_id, max_updates=3, activation_checkpointing=patterns)
        train(run)
        weights.append(bits(run.trainer.model.tensors()))
    assert weights[0] == weights[1]
