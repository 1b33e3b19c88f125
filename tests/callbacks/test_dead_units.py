from functools import partial

import pytest
import torch
from torch import nn

from callbacks.dead_units import DeadUnits
from callbacks.ema import Ema
from ksuit_runner.errors import ConfigError
from ksuit_runner.models.mlp import Mlp


def net():
    """Return a network with dead units: 1 of 4 channels, and 5 of 20 units."""
    torch.manual_seed(4)
    conv, linear = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 20)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Sequential(linear, nn.ReLU6()), nn.Linear(20, 10))
    with torch.no_grad():
        conv.bias.fill_(1.0)[2] = -1e3
        linear.bias.fill_(1.0)[5:10] = -1e3
    return model


def test_the_fraction_is_that_of_units_that_no_sample_makes_positive(new_run, digits):
    callbacks = {"ema": Ema, "dead": partial(DeadUnits, dataset_key="test", every_n_updates=2)}
    optimizer = partial(torch.optim.SGD, lr=0.01)
    run = new_run(callbacks, module=net(), max_updates=2, optimizer=optimizer).train()
    inputs = torch.stack([digits["test"][i][0] for i in range(len(digits["test"]))])
    with torch.no_grad():
        channels = run.model.module[:2](inputs)
        units = run.model.module[:4](inputs)
    dead = {"1": (channels.amax((0, 2, 3)) <= 0).double(), "3.1": (units.amax(0) <= 0).double()}
    assert dead["1"].sum() >= 1 and dead["3.1"].sum() >= 5
    for module, expected in dead.items():
        assert run.metric(f"dead_units/{module}/test") == {2: expected.mean().item()}
        assert run.metric(f"dead_units/{module}/test/ema")[2] > 0
    assert run.metric("dead_units/test") == {2: torch.cat([*dead.values()]).mean().item()}
    assert not any(item._forward_hooks for item in run.model.modules())


def test_a_layer_before_a_relu_that_is_a_function_has_the_same_units(new_run):
    torch.manual_seed(4)
    module = Mlp((1, 8, 8), (10,), hidden_dims=(16, 8))
    with torch.no_grad():
        module.hidden[0].bias[:4] = -1e3
    dead = partial(DeadUnits, dataset_key="test", match=["hidden.{}"], unit_dim=1, every_n_updates=1)
    run = new_run({"dead": dead}, module=module, max_updates=1).train()
    assert run.metric("dead_units/hidden.0/test")[1] >= 0.25
    with pytest.raises(ConfigError, match=r"callbacks.dead.match: the model has no nn.ReLU: name .* 'hidden.{}'"):
        new_run({"dead": partial(DeadUnits, dataset_key="test", every_n_updates=1)}, "none", module=module)
