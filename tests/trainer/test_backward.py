"""The backward pass by the engine itself: it computes and refuses what ``Tensor.backward`` does, with any torch."""

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ksuit_runner.trainer import backward as module
from ksuit_runner.trainer.backward import backward


def _loss(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    return nn.functional.cross_entropy(model(torch.randn(8, 5)), torch.arange(8) % 3)


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_gradients_are_those_of_tensor_backward_to_the_bit_and_add_up() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    _loss(model).backward()
    once = _gradients(model)
    _loss(model).backward()
    twice = _gradients(model)
    model.zero_grad()
    assert module._engine() is not None, "this version of torch has another engine: the pass is the slow one"
    backward(loss := _loss(model))
    assert all(map(torch.equal, _gradients(model), once))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        backward(loss)
    backward(loss := _loss(model), retain_graph=True)
    assert all(map(torch.equal, _gradients(model), twice))
    backward(loss, inputs=[model[0].weight])
    assert not torch.equal(_gradients(model)[0], twice[0])
    assert torch.equal(_gradients(model)[1], twice[1])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (torch.ones(3, requires_grad=True) * 2, "only for scalar outputs"),
        (torch.ones((), dtype=torch.complex64, requires_grad=True) * 2, "only for real scalar outputs"),
        (torch.ones(()), "does not require grad"),
    ],
)
def test_refuses_what_torch_refuses(loss: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message) as raised:
        backward(loss)
    assert any("depends on nothing that is trained" in note for note in getattr(raised.value, "__notes__", ())) != (
        loss.requires_grad
    )


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_a_mode_that_watches_torch_sees_the_pass() -> None:
    loss = _loss(nn.Linear(5, 3))
    with _Watch() as watch:
        backward(loss)
    assert "backward" in watch.names


def test_a_torch_with_another_engine_does_the_pass_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.autograd.Variable, "_execution_engine", object())
    monkeypatch.setattr(Tensor, "backward", lambda loss, **options: calls.append(options))
    module._engine.cache_clear()
    try:
        backward(_loss(nn.Linear(5, 3)))
    finally:
        module._engine.cache_clear()
    assert calls == [{"retain_graph": False, "inputs": None}]
