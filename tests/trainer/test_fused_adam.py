from copy import deepcopy
from functools import wraps

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizer_module

from ksuit_runner.trainer.fused_adam import FusedStep, _has_known_kernels

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


def test_a_loaded_state_is_used(bits):
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


def test_what_thaws_is_trained_from_then_on(bits):
    (model, optimizer), (other, reference) = make(*PLAIN[1]), make(*PLAIN[1])
    fused = FusedStep(optimizer)
    for item, adam, do in ((model, optimizer, fused), (other, reference, reference.step)):
        item[0].requires_grad_(False)
        train(item, adam, do, range(2))
        item[0].requires_grad_(True)
        item[2].bias.requires_grad_(False)
        train(item, adam, do, range(2, 5))
    assert is_direct(fused)
    assert bits(model.state_dict()) == bits(other.state_dict())
    assert bits(optimizer.state_dict()) == bits(reference.state_dict())


def test_a_state_that_was_cleared_starts_over(bits):
    (model, optimizer), (other, reference) = make(*PLAIN[0]), make(*PLAIN[0])
    fused = FusedStep(optimizer)
    for item, adam, do in ((model, optimizer, fused), (other, reference, reference.step)):
        train(item, adam, do, range(3))
        adam.state.clear()
        train(item, adam, do, range(3, 5))
    assert bits(model.state_dict()) == bits(other.state_dict())


def wrap(calls, step):
    @wraps(step)
    def counted(*args, **kwargs):
        calls.append(1)
        return step(*args, **kwargs)

    return counted


@pytest.mark.parametrize("where", ["object", "class", "before", "subclass", "pre", "post"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_replaced_step_and_global_hooks_are_called(monkeypatch, where, scheduled):
    calls, (kind, options) = [], PLAIN[0]
    if where == "before":
        monkeypatch.setattr(kind, "step", wrap(calls, kind.step))
    if where == "subclass":
        kind = type("Own", (kind,), {"step": wrap(calls, kind.step)})
    model, optimizer = make(kind, options)
    if scheduled:  # torch's schedules replace the step as well
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    fused = FusedStep(optimizer)
    train(model, optimizer, fused, range(2))
    handle = None
    if where == "object":
        optimizer.step = wrap(calls, optimizer.step)
    if where == "class" and not scheduled:  # what a schedule has put there does not ask the class
        monkeypatch.setattr(kind, "step", wrap(calls, kind.step))
    if where in ("pre", "post"):
        register = getattr(optimizer_module, f"register_optimizer_step_{where}_hook")
        handle = register(lambda *_: calls.append(1))
    train(model, optimizer, fused, range(2, 4))
    if handle is not None:
        handle.remove()
    assert len(calls) == {"before": 4, "subclass": 4}.get(where, 0 if where == "class" and scheduled else 2)


def test_with_a_schedule_of_torch_the_kernels_are_still_called_directly():
    model, optimizer = make(*PLAIN[0])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    fused = FusedStep(optimizer)
    train(model, optimizer, fused, range(1))
    assert is_direct(fused)


def test_unannounced_sparse_gradients_go_to_kernels_that_take_them():
    table = nn.Parameter(torch.ones(5, 2))
    optimizer = torch.optim.SGD([table], lr=1.0, fused=True)
    nn.functional.embedding(torch.tensor([1, 1]), table, sparse=True).sum().backward()
    FusedStep(optimizer)()
    assert table.tolist() == [[1, 1], [-1, -1], [1, 1], [1, 1], [1, 1]]


def test_hooks_of_the_optimizer_are_called():
    model, optimizer = make(*PLAIN[0])
    fused = FusedStep(optimizer)
    train(model, optimizer, fused, range(2))
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(model, optimizer, fused, range(2, 4))
    assert calls == [1, 1]


PRIVATE = [
    *((torch, name) for name in ("_fused_adam_", "_fused_adamw_")),
    *((optimizer_module, f"_global_optimizer_{when}_hooks") for when in ("pre", "post")),
    *((None, f"_optimizer_step_{when}_hooks") for when in ("pre", "post")),
]


@pytest.mark.parametrize(("owner", "name"), PRIVATE, ids=lambda item: item if isinstance(item, str) else "")
def test_without_a_private_part_of_torch_the_optimizer_does_its_step(bits, monkeypatch, owner, name):
    (model, optimizer), (other, reference) = make(*PLAIN[0]), make(*PLAIN[0])
    with monkeypatch.context() as patch:
        patch.delattr(owner or optimizer, name)
        _has_known_kernels.cache_clear()
        fused = FusedStep(optimizer)
    _has_known_kernels.cache_clear()
    train(model, optimizer, fused, range(2))
    train(other, reference, reference.step, range(2))
    assert not is_direct(fused)
    assert bits(model.state_dict()) == bits(other.state_dict())
