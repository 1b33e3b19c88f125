import logging

from torch import nn

from callbacks.parameter_count import ParameterCount


def test_trainable_parameters_are_counted_before_the_first_update(new_run, caplog):
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.Linear(30, 10))
    layers[1].bias.requires_grad_(False)
    with caplog.at_level(logging.INFO, "ksuit_runner"):
        run = new_run({"parameters": ParameterCount}, module=layers, max_updates=2).train()
    assert run.metric("parameter_count") == {0: 64 * 30 + 30 * 10 + 10}
    assert caplog.messages == ["parameter_count: 2,230"]


def test_a_resumed_run_does_not_log_it_again(new_run):
    new_run({"parameters": ParameterCount}, stop_at=3).train()
    run = new_run({"parameters": ParameterCount}).train()
    assert run.metric("parameter_count") == {0: 650}
