from copy import deepcopy

import pytest
import torch
from torch import nn

from ksuit_runner.fused_step import FusedStep

PLAIN = [
    (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    (torch.optim.AdamW, {"lr": 1e-2, "fused": True, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.3}),
    (torch.optim.AdamW, {"lr": 1e-2, "fused": True, "maximize": True}),
    (torch.optim.Adam, {"lr": 1e-2, "fused": True, "weight_decay": 0.1}),
]
OTHERS = [
    (torch.optim.AdamW, {"lr": 1e-2}),
    (torch.optim.AdamW, {"lr": 1e-2, "fused": True, "amsgrad": True}),
    (torch.optim.Adam, {"lr": torch.tensor(1e-2), "fused": True}),
    (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "fused": True}),
]


def make(kind, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    optimizer = kind([{"params": weights}, {"params": biases, "lr": 0.5 * options["lr"]}], **options)
    return model, optimizer


def compute_gradients(model, update):
    generator = torch.Generator().manual_seed(update)
    model(torch.randn(4, 5, generator=generator)).square().sum().backward()


def train(model, optimizer, step, updates):
    for update in updates:
        compute_gradients(model, update)
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], torch.Tensor):
                group["lr"] *= 0.9  # as a schedule does
        step()
        for parameter in model.parameters():
            parameter.grad = None


def is_direct(fused):
    return bool(fused._groups)


@pytest.mark.parametrize(("kind", "options"), PLAIN + OTHERS)
def test_weights_and_state_are_those_of_the_optimizers_own_step(bits, kind, options):
    (model, optimizer), (other, reference) = make(kind, options), make(kind, options)
    fused = FusedStep(optimizer)
    train(model, optimizer, fused, range(6))
    train(other, reference, reference.step, range(6))
    assert is_direct(fused) is ((kind, options) in PLAIN)
    assert bits(model.state_dict()) == bits(other.state_dict())
    assert bits(optimizer.state_dict()) == bits(reference.state_dict())


def test_a_state_that_is_loaded_is_the_one_that_counts(bits):
    model, optimizer = make(*PLAIN[0])
    fused = FusedStep(optimizer)
    train(model, optimizer, fused, range(3))
    weights, state = deepcopy(model.state_dict()), deepcopy(optimizer.state_dict())
    train(model, optimizer, fused, range(3, 5))
    expected = bits(model.state_dict()), bits(optimizer.state_dict())
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(model, optimizer, fused, range(3, 5))
    assert (bits(model.state_dict()), bits(optimizer.state_dict())) == expected


def test_a_parameter_without_a_gradient_stays():
    model, optimizer = make(*PLAIN[0])
    fused = FusedStep(optimizer)
    train(model, optimizer, fused, range(2))
    compute_gradients(model, 2)
    before, model[0].weight.grad = model[0].weight.clone(), None
    other = model[2].weight.clone()
    fused()
    assert (model[0].weight == before).all()
    assert (model[2].weight != other).any()


def test_hooks_of_the_optimizer_are_called():
    model, optimizer = make(*PLAIN[0])
    fused = FusedStep(optimizer)
    train(model, optimizer, fused, range(2))
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(model, optimizer, fused, range(2, 4))
    assert calls == [1, 1]
