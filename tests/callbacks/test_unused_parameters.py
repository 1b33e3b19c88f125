from functools import partial

import pytest
import torch
from torch import nn

from callbacks.unused_parameters import UnusedParameters


class Net(nn.Module):
    """Has a layer that is never called, one that is called from the third update on, and one that is cut off."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(64, 10)
        self.spare = nn.ModuleList(nn.Linear(2, 2) for _ in range(12))
        self.late = nn.Linear(10, 10)
        self.cut = nn.Linear(10, 10)
        self.frozen = nn.Linear(2, 2)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs):
        outputs = self.head(inputs.flatten(1))
        self.passes += self.training
        if self.passes > 2:
            outputs = outputs + self.late(outputs)
        return outputs + self.cut(outputs).detach()


def test_parameters_without_a_gradient_are_counted_and_named(new_run, caplog):
    callbacks = {"unused": partial(UnusedParameters, every_n_updates=2)}
    options = {"max_updates": 6, "freeze": ["frozen.*"]}
    whole = new_run(callbacks, "whole", module=Net(), **options).train()
    assert whole.metric("unused_parameters") == {2: 28, 4: 26, 6: 26}
    shown = [record.getMessage() for record in caplog.records if "no gradient" in record.message]
    assert len(shown) == 2
    assert shown[0].endswith(
        f"{', '.join(f'spare.{i}.{name}' for i in range(10) for name in ('weight', 'bias'))} and 8 more"
    )
    caplog.clear()
    new_run(callbacks, "cut", module=Net(), stop_at=3, **options).train()
    resumed = new_run(callbacks, "cut", module=Net(), **options).train()
    assert resumed.metric("unused_parameters") == whole.metric("unused_parameters")
    assert len([record for record in caplog.records if "no gradient" in record.message]) == 2
    alone = new_run({}, "alone", module=Net(), **options).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in whole.weights.items())


@pytest.mark.parametrize("parts", [1, 2])
def test_nothing_is_said_of_a_model_that_is_trained_wholly(new_run, caplog, parts):
    run = new_run({"unused": partial(UnusedParameters, every_n_updates=1)}, max_updates=1, accumulation_steps=parts)
    assert run.train().metric("unused_parameters") == {1: 0}
    assert not [record for record in caplog.records if "no gradient" in record.message]
