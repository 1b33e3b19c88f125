import logging

from torch import nn

from callbacks.parameter_count import ParameterCount
from ksuit_runner.tracker.noop import NoopTracker


def test_trainable_parameters_are_a_parameter_of_the_run(new_run, caplog, monkeypatch):
    recorded = {}
    monkeypatch.setattr(NoopTracker, "log_params", lambda self, params: recorded.update(params))
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.Linear(30, 10))
    layers[1].bias.requires_grad_(False)
    with caplog.at_level(logging.INFO, "ksuit_runner"):
        run = new_run({"parameters": ParameterCount}, module=layers, max_updates=2).train()
    assert recorded == {"parameter_count": 64 * 30 + 30 * 10 + 10}
    assert not run.metrics(), "a metric would be a chart of one point"
    assert caplog.messages == ["parameter_count: 2,230"]
